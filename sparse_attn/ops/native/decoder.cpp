// A decoder layer in a decode step: what multiplies before and behind attention, around the calls of whole.h.
#include "decoder.h"

#include <algorithm>

#include "runtime.h"

namespace {

int64_t rows_of(const foveate_whole_step* step) { return step->attention.num_sequences; }

float* scratch(int64_t elements) { return static_cast<float*>(foveate_scratch(elements * int64_t(sizeof(float)), 3)); }

// The heads of ``rows`` tokens, normed where they lie.
void norm_heads(foveate_norm norm, float* first, int64_t channels, int64_t token_stride, int64_t rows) {
    if (!norm.width) return;
    norm.input_stride = norm.width;
    norm.rows = channels / norm.width;
    norm.num_threads = 1;  // a few KiB
    for (int64_t row = 0; row < rows; ++row) {
        norm.input = norm.out = first + row * token_stride;
        foveate_norm_run(&norm);
    }
}

int32_t begin(const foveate_decoder& decoder, const foveate_whole_step* step, const foveate_whole_layer* layer,
              const float* x, float* normed, float* heads) {
    const int32_t threads = step->attention.num_threads;
    foveate_norm norm = decoder.norm;
    norm.input = x;
    norm.input_stride = norm.width;
    norm.out = normed;
    norm.rows = rows_of(step);
    norm.num_threads = threads;
    foveate_norm_run(&norm);
    foveate_narrow product = decoder.heads;
    product.input = normed;
    product.input_stride = norm.width;
    product.out = heads;
    product.rows = rows_of(step);
    product.num_threads = threads;
    foveate_narrow_run(&product);
    const foveate_attention& facts = step->attention;
    const int64_t queries = int64_t(facts.num_heads) * facts.head_dim, keys = int64_t(facts.num_kv_heads) * facts.head_dim;
    float* key = heads + queries;
    norm_heads(decoder.query_norm, heads, queries, product.out_channels, rows_of(step));
    norm_heads(decoder.key_norm, key, keys, product.out_channels, rows_of(step));
    return foveate_whole_run(step, layer, nullptr, heads, key, key + keys, nullptr);
}

int32_t end(const foveate_decoder& decoder, const foveate_whole_step* step, const foveate_whole_layer* layer,
            const foveate_whole_choice* choice, float* heads, float* attended, const float* x, float* out) {
    if (foveate_whole_run(step, layer, choice, heads, nullptr, nullptr, attended)) return 1;
    return foveate_finish_run(&decoder.finish, attended, x, out, rows_of(step), step->attention.num_threads);
}

int64_t attended_of(const foveate_decoder* decoder) { return decoder->finish.output.in_channels; }

}  // namespace

extern "C" {

int32_t foveate_decoder_size(void) { return int32_t(sizeof(foveate_decoder)); }

int32_t foveate_decoder_begin(const foveate_decoder* decoder, const foveate_whole_step* step,
                              const foveate_whole_layer* layer, const float* x, float* heads) {
    float* normed = scratch(rows_of(step) * decoder->norm.width);
    return normed ? begin(*decoder, step, layer, x, normed, heads) : 1;
}

int32_t foveate_decoder_end(const foveate_decoder* decoder, const foveate_whole_step* step,
                            const foveate_whole_layer* layer, const foveate_whole_choice* choice, float* heads,
                            const float* x, float* out) {
    float* attended = scratch(rows_of(step) * attended_of(decoder));
    return attended ? end(*decoder, step, layer, choice, heads, attended, x, out) : 1;
}

int32_t foveate_decoder_run(const foveate_decoder* const* decoders, const foveate_whole_step* step,
                            const foveate_whole_layer* const* layers, const foveate_whole_choice* const* choices,
                            int64_t count, const float* x, float* out) {
    const int64_t rows = rows_of(step);
    int64_t most = 0;
    for (int64_t i = 0; i < count; ++i)
        most = std::max(most, decoders[i]->norm.width + decoders[i]->heads.out_channels + attended_of(decoders[i]));
    float* normed = scratch(rows * most);
    if (!normed) return 1;
    for (int64_t i = 0; i < count; ++i, x = out) {  // a layer is done with its input before it writes its output
        float* heads = normed + rows * decoders[i]->norm.width;
        float* attended = heads + rows * decoders[i]->heads.out_channels;
        if (const int32_t code = begin(*decoders[i], step, layers[i], x, normed, heads)) return code;
        if (const int32_t code = end(*decoders[i], step, layers[i], choices[i], heads, attended, x, out)) return code;
    }
    return 0;
}
}
