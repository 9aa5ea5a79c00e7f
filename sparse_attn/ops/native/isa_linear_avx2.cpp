#include "linear_nibbles.h"
#include "linear_words.h"

namespace {

using Few = DotLinear<Lanes8<WordDot>>;

void multiply(const foveate_linear& call, const Activations& input, int64_t first, int64_t last, int64_t first_block,
              int64_t last_block, void* scratch) {
    auto* chosen = Few::multiply;
    if (call.weight_bits == 8 && last - first >= WordPieces::kLeastRows) chosen = multiply_words;
    if (call.weight_bits == 4 && input.planes == 1) chosen = multiply_nibbles;
    chosen(call, input, first, last, first_block, last_block, scratch);
}

constexpr int64_t kRowBytes = WordPieces::kRowBytes > NibblePieces::kRowBytes ? WordPieces::kRowBytes : NibblePieces::kRowBytes;

}  // namespace

constexpr LinearKernels kLinearAvx2 = {LinearInput<Lanes8<WordDot>>::quantize, multiply, Few::widen, kRowBytes, 1,
                                       NibblePieces::kPanel, Few::nothing, Few::nothing};
