/* logit_dump.c - looks without touching: every logit goes to dump [query tokens, heads, keys]. A tensor
 * that is written is declared with access "w"; no two rows may write the same element. */
float raddle_variant_logit(const raddle_variant *v, const raddle_row *row, int32_t kv_index,
                           float logit) {
    v->dump.data[row->token * v->dump.stride[0] + row->qo_head * v->dump.stride[1] +
                 kv_index * v->dump.stride[2]] = logit;
    return logit;
}
