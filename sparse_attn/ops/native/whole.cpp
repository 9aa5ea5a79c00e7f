// One layer of a decode step: fills in the calls of writing, of a choice that its queries decide and of attention.
#include "whole.h"

#include <algorithm>

#include "pairs.h"

namespace {

bool write_layer(const foveate_whole_step& step, const foveate_whole_layer& layer, void* query, const void* key,
                 const void* value) {
    foveate_write write = step.write;
    if (!layer.rotates) write.cos = write.sin = nullptr;
    write.query = query;
    write.key = key;
    write.value = value;
    write.keys = layer.keys;
    write.values = layer.values;
    write.key_scales = layer.key_scales;
    write.value_scales = layer.value_scales;
    write.key_sum = layer.stats[0];
    write.key_min = layer.stats[1];
    write.key_max = layer.stats[2];
    write.value_sum = layer.stats[3];
    write.value_min = layer.stats[4];
    write.value_max = layer.stats[5];
    write.key_sum_16 = layer.stats[6];
    write.query_token_stride = layer.query_token_stride;
    write.key_token_stride = layer.key_token_stride;
    write.value_token_stride = layer.value_token_stride;
    return foveate_write_run(&write) == 0;
}

// Ranks the keys that the layer holds by its queries. False when no memory was left.
bool rank(const foveate_whole_step& step, const foveate_whole_layer& layer, foveate_anchor call, const void* query) {
    foveate_attention& facts = call.attention;
    facts.query = query;
    facts.query_token_stride = layer.query_token_stride;
    facts.query_head_stride = step.attention.query_head_stride;
    facts.keys = facts.values = layer.keys;  // values are never read
    facts.key_scales = facts.value_scales = layer.key_scales;
    facts.sinks = layer.sinks;
    facts.scale = layer.scale;
    facts.softcap = layer.softcap;
    return foveate_anchor_run(&call) == 0;
}

// Each head's row from that of another.
void give_rows(const foveate_whole_choice& choice) {
    for (int64_t i = 0; i < int64_t(choice.num_tiles) * choice.selected_heads; ++i) {
        const int64_t from = i / choice.selected_heads * choice.from_heads + choice.head_map[i % choice.selected_heads];
        std::copy_n(choice.from_indices + from * choice.selected_width, choice.selected_width,
                    choice.indices + i * choice.selected_width);
        choice.counts[i] = choice.from_counts[from];
    }
}

// Makes the selection that a layer's own queries decide. False when no memory was left.
bool choose(const foveate_whole_step& step, const foveate_whole_layer& layer, const foveate_whole_choice& choice,
            const void* query) {
    if (choice.rank && !rank(step, layer, *choice.rank, query)) return false;
    if (choice.keep) foveate_selection_keep(choice.keep);
    if (choice.head_map) give_rows(choice);
    return true;
}

foveate_attention attention_of(const foveate_whole_step& step, const foveate_whole_layer& layer,
                               const foveate_whole_choice* choice, const void* query, void* out) {
    foveate_attention attention = step.attention;
    attention.query = query;
    attention.query_token_stride = layer.query_token_stride;
    attention.keys = layer.keys;
    attention.values = layer.values;
    attention.key_scales = layer.key_scales;
    attention.value_scales = layer.value_scales;
    attention.sinks = layer.sinks;
    attention.out = out;
    attention.farthest = layer.farthest;
    attention.scale = layer.scale;
    attention.softcap = layer.softcap;
    if (choice && !choice->whole) {
        attention.indices = choice->indices;
        attention.counts = choice->counts;
        attention.tile_sequence = choice->tile_sequence;
        attention.tile_start = choice->tile_start;
        attention.tile_count = choice->tile_count;
        attention.tile_position = choice->tile_position;
        attention.selected_width = choice->selected_width;
        attention.num_tiles = choice->num_tiles;
        attention.selected_heads = choice->selected_heads;
        attention.granularity = choice->granularity;
    }
    return attention;
}

// Adds the reads of every sequence, and those of dense attention, to ``keys_read``.
void book(const foveate_whole_step& step, const foveate_attention& call) {
    for (int s = 0; s < call.num_sequences; ++s) {
        const double reads = double(std::min(call.context_lens[s], call.farthest)) * call.num_heads;
        step.keys_read[2 * step.owners[s] + 1] += reads;
        if (!call.indices) step.keys_read[2 * step.owners[s]] += reads;
    }
    if (!call.indices) return;
    const double heads = double(call.num_heads) / call.selected_heads;
    for (int64_t i = 0; i < int64_t(call.num_tiles) * call.selected_heads; ++i) {
        const int64_t r = i / call.selected_heads, end = int64_t(call.tile_position[r]) + call.tile_count[r];
        const int64_t pairs = pairs_of(call.indices + i * call.selected_width, call.selected_width, call.granularity,
                                       call.tile_count[r], end, end - call.farthest);
        step.keys_read[2 * step.owners[call.tile_sequence[r]]] += double(pairs) * heads;
    }
}

}  // namespace

extern "C" {

int32_t foveate_whole_step_size(void) { return int32_t(sizeof(foveate_whole_step)); }

int32_t foveate_whole_layer_size(void) { return int32_t(sizeof(foveate_whole_layer)); }

int32_t foveate_whole_choice_size(void) { return int32_t(sizeof(foveate_whole_choice)); }

int32_t foveate_whole_run(const foveate_whole_step* step, const foveate_whole_layer* layer,
                          const foveate_whole_choice* choice, void* query, const void* key, const void* value,
                          void* out) {
    if (key && !write_layer(*step, *layer, query, key, value)) return 2;
    if (!out) return 0;
    if (choice && !choose(*step, *layer, *choice, query)) return 1;
    const foveate_attention attention = attention_of(*step, *layer, choice, query, out);
    book(*step, attention);
    return foveate_decode(&attention);
}
}
