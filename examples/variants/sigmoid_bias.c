/* sigmoid_bias.c - attention without softmax: each key's weight is sigmoid(logit + bias), whatever the
 * others are (arXiv 2409.04431, where bias is -log of the sequence length). Made with softmax=False,
 * so that what raddle_variant_logit returns is the weight. */
float raddle_variant_logit(const raddle_variant *v, const raddle_row *row, int32_t kv_index,
                           float logit) {
    return raddle_sigmoid(logit + v->bias);
}
