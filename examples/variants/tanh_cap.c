/* tanh_cap.c - logits that saturate: cap * tanh(logit / cap), as Gemma 2 has them. raddle_soft_cap is
 * the same, made of polynomials that compilers turn into vectors. */
float raddle_variant_logit(const raddle_variant *v, const raddle_row *row, int32_t kv_index,
                           float logit) {
    return v->cap * tanhf(logit / v->cap);
}
