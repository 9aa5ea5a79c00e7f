// One layer of a decode step that reads every key: fills in the calls of writing and of attention, and runs them.
#include "whole.h"

extern "C" {

int32_t foveate_whole_step_size(void) { return int32_t(sizeof(foveate_whole_step)); }

int32_t foveate_whole_layer_size(void) { return int32_t(sizeof(foveate_whole_layer)); }

int32_t foveate_whole_run(const foveate_whole_step* step, const foveate_whole_layer* layer, void* query,
                          const void* key, const void* value, void* out) {
    foveate_write write = step->write;
    if (!layer->rotates) write.cos = write.sin = nullptr;
    write.query = query;
    write.key = key;
    write.value = value;
    write.keys = layer->keys;
    write.values = layer->values;
    write.key_scales = layer->key_scales;
    write.value_scales = layer->value_scales;
    write.key_sum = layer->stats[0];
    write.key_min = layer->stats[1];
    write.key_max = layer->stats[2];
    write.value_sum = layer->stats[3];
    write.value_min = layer->stats[4];
    write.value_max = layer->stats[5];
    write.query_token_stride = layer->query_token_stride;
    write.key_token_stride = layer->key_token_stride;
    write.value_token_stride = layer->value_token_stride;
    if (foveate_write_run(&write)) return 2;

    foveate_attention attention = step->attention;
    attention.query = query;
    attention.query_token_stride = layer->query_token_stride;
    attention.keys = layer->keys;
    attention.values = layer->values;
    attention.key_scales = layer->key_scales;
    attention.value_scales = layer->value_scales;
    attention.sinks = layer->sinks;
    attention.out = out;
    attention.farthest = layer->farthest;
    attention.scale = layer->scale;
    attention.softcap = layer->softcap;
    for (int s = 0; s < attention.num_sequences; ++s) {
        const int32_t context = attention.context_lens[s];
        const double reads = double(context < layer->farthest ? context : layer->farthest) * attention.num_heads;
        for (int i = 0; i < 2; ++i) step->keys_read[2 * step->owners[s] + i] += reads;
    }
    return foveate_decode(&attention);
}
}
