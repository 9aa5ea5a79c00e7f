// A decoder layer in a decode step: what multiplies before and behind attention, around the calls of whole.h.
#include "decoder.h"

#include <algorithm>
#include <cstring>

#include "runtime.h"

namespace {

int64_t rows_of(const foveate_whole_step* step) { return step->attention.num_sequences; }

bool is_narrow(const foveate_whole_step* step) { return step->attention.dtype == FOVEATE_BFLOAT16; }

float* scratch(int64_t elements) { return static_cast<float*>(foveate_scratch(elements * int64_t(sizeof(float)), 3)); }

bool is_set(const foveate_product& product) { return product.narrow || product.linear; }

// Of queries, keys and values together, in one token.
int64_t heads_of(const foveate_decoder* decoder) {
    int64_t channels = 0;
    for (const foveate_product& projection : decoder->projections)
        if (is_set(projection)) channels += out_channels_of(projection);
    return channels;
}

int64_t attended_of(const foveate_decoder* decoder) { return in_channels_of(decoder->finish.output); }

// To nearest even; what is no number stays none.
void to_bfloat16(const float* from, uint16_t* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, from + i, 4);
        const bool none = (bits & 0x7fffffff) > 0x7f800000;
        to[i] = uint16_t(none ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}

void to_float32(const uint16_t* from, float* to, int64_t count) {
    for (int64_t i = count - 1; i >= 0; --i) {  // from behind: they may begin at one place
        const uint32_t bits = uint32_t(from[i]) << 16;
        std::memcpy(to + i, &bits, 4);
    }
}

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

// ``wide`` is where the heads are computed in float32; ``heads`` itself where that is their type.
int32_t begin(const foveate_decoder& decoder, const foveate_whole_step* step, const foveate_whole_layer* layer,
              const float* x, float* normed, float* wide, void* heads) {
    const int32_t threads = step->attention.num_threads;
    const int64_t rows = rows_of(step);
    foveate_norm norm = decoder.norm;
    norm.input = x;
    norm.input_stride = norm.width;
    norm.out = normed;
    norm.rows = rows;
    norm.num_threads = threads;
    foveate_norm_run(&norm);
    float* out = wide;
    for (const foveate_product& projection : decoder.projections) {
        if (!is_set(projection)) break;
        if (multiply(projection, normed, nullptr, out, rows, threads)) return 1;
        out += rows * out_channels_of(projection);
    }
    const foveate_attention& facts = step->attention;
    const int64_t queries = int64_t(facts.num_heads) * facts.head_dim, keys = int64_t(facts.num_kv_heads) * facts.head_dim;
    const bool joint = !is_set(decoder.projections[1]);
    const int64_t key = joint ? queries : rows * queries, value = key + (joint ? keys : rows * keys);
    norm_heads(decoder.query_norm, wide, queries, layer->query_token_stride, rows);
    norm_heads(decoder.key_norm, wide + key, keys, layer->key_token_stride, rows);
    const int64_t bytes = is_narrow(step) ? sizeof(uint16_t) : sizeof(float);
    if (is_narrow(step)) to_bfloat16(wide, static_cast<uint16_t*>(heads), rows * (queries + 2 * keys));
    char* base = static_cast<char*>(heads);
    return foveate_whole_run(step, layer, nullptr, heads, base + key * bytes, base + value * bytes, nullptr);
}

int32_t end(const foveate_decoder& decoder, const foveate_whole_step* step, const foveate_whole_layer* layer,
            const foveate_whole_choice* choice, void* heads, float* attended, const float* x, float* out) {
    if (foveate_whole_run(step, layer, choice, heads, nullptr, nullptr, attended)) return 1;
    const int64_t rows = rows_of(step);
    if (is_narrow(step)) to_float32(reinterpret_cast<uint16_t*>(attended), attended, rows * attended_of(&decoder));
    return foveate_finish_run(&decoder.finish, attended, x, out, rows, step->attention.num_threads);
}

}  // namespace

extern "C" {

int32_t foveate_decoder_size(void) { return int32_t(sizeof(foveate_decoder)); }

int32_t foveate_decoder_begin(const foveate_decoder* decoder, const foveate_whole_step* step,
                              const foveate_whole_layer* layer, const float* x, void* heads) {
    const int64_t rows = rows_of(step);
    float* normed = scratch(rows * (decoder->norm.width + heads_of(decoder)));
    if (!normed) return 1;
    float* wide = is_narrow(step) ? normed + rows * decoder->norm.width : static_cast<float*>(heads);
    return begin(*decoder, step, layer, x, normed, wide, heads);
}

int32_t foveate_decoder_end(const foveate_decoder* decoder, const foveate_whole_step* step,
                            const foveate_whole_layer* layer, const foveate_whole_choice* choice, void* heads,
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
        most = std::max(most, decoders[i]->norm.width + 2 * heads_of(decoders[i]) + attended_of(decoders[i]));
    float* normed = scratch(rows * most);
    if (!normed) return 1;
    for (int64_t i = 0; i < count; ++i, x = out) {  // a layer is done with its input before it writes its output
        float* wide = normed + rows * decoders[i]->norm.width;
        float* heads = is_narrow(step) ? wide + rows * heads_of(decoders[i]) : wide;
        float* attended = wide + 2 * rows * heads_of(decoders[i]);
        if (const int32_t code = begin(*decoders[i], step, layers[i], x, normed, wide, heads)) return code;
        if (const int32_t code = end(*decoders[i], step, layers[i], choices[i], heads, attended, x, out)) return code;
    }
    return 0;
}
}
