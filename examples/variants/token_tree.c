/* token_tree.c - speculative decoding with a tree of drafts: the last qo_len keys of a request are the
 * drafts themselves. All of what was accepted before is seen; of the drafts, the ancestors in the
 * tree, which ancestors [query tokens, drafts] marks. */
bool raddle_variant_mask(const raddle_variant *v, const raddle_row *row, int32_t kv_index) {
    const int32_t draft = kv_index - (row->kv_len - row->qo_len);
    return draft < 0 ||
           v->ancestors
                   .data[row->token * v->ancestors.stride[0] + draft * v->ancestors.stride[1]] != 0;
}
