// Pages of int8 for the engines of prefill: a block is widened once to rows of the engine's own type, scales multiplied
// in, and then read by all of the item's columns. With 384 of them that is a small part of the work.
#pragma once

#include "prefill.h"

namespace {

template <class Engine>
class Quantised : public Engine {
public:
    using T = typename Engine::T;
    using Row = int8_t;
    static constexpr int kBlock = Engine::kBlock;
    static constexpr bool kBytes = true;

    static int64_t scratch(int dim) {
        Arena arena(nullptr);
        arena.take<char>(Engine::scratch(dim));
        arena.take<T>(int64_t(2) * kBlock * dim);
        arena.take<KeyBlock<T>>(1);
        return arena.used(nullptr);
    }

    Quantised(void* memory, int dim) : Engine(memory, dim), dim_(dim) {
        Arena arena(memory);
        arena.take<char>(Engine::scratch(dim));
        rows_ = arena.take<T>(int64_t(2) * kBlock * dim);
        wide_ = arena.take<KeyBlock<T>>(1);
    }

    void load_keys(const KeyBlock<Row>& block) {
        widen_keys(block);
        Engine::load_keys(*wide_);
    }

    void load(const KeyBlock<Row>& block) {
        widen_keys(block);
        widen(block.values, block.value_scales, rows_ + int64_t(kBlock) * dim_, wide_->values);
        Engine::load(*wide_);
    }

    void logits(const KeyBlock<Row>&, const float* queries, float* out, int first, int last) {
        Engine::logits(*wide_, queries, out, first, last);
    }

    void accumulate(const KeyBlock<Row>&, const float* weights, float* outputs, int first, int last) {
        Engine::accumulate(*wide_, weights, outputs, first, last);
    }

private:
    void widen_keys(const KeyBlock<Row>& block) {
        wide_->count = block.count;
        widen(block.keys, block.key_scales, rows_, wide_->keys);
    }

    void widen(const Row* const* rows, const float* scales, T* copies, const T** wide) const {
        using S = typename Engine::Simd;
        for (int i = 0; i < wide_->count; ++i, copies += dim_) {
            const typename S::F scale = S::set(scales[i]);
            for (int d = 0; d < dim_; d += S::W) S::store(copies + d, S::mul(S::load(rows[i] + d), scale));
            wide[i] = copies;
        }
    }

    const int dim_;
    T* rows_;            // [2][kBlock][dim]: keys, then values
    KeyBlock<T>* wide_;
};

}  // namespace
