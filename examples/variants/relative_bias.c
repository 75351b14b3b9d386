/* relative_bias.c - a learned number per head and distance (arXiv 1910.10683): bias is [heads,
 * distances], of keys further back the last one counts. */
float raddle_variant_logit(const raddle_variant *v, const raddle_row *row, int32_t kv_index,
                           float logit) {
    const int32_t last = (int32_t)v->bias.shape[1] - 1;
    int32_t distance = raddle_row_position(row) - kv_index;
    distance = distance < 0 ? 0 : distance > last ? last : distance;
    return logit + v->bias.data[row->qo_head * v->bias.stride[0] + distance * v->bias.stride[1]];
}
