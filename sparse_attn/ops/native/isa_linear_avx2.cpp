#include "linear_words.h"

namespace {
using Few = DotLinear<Lanes8<WordDot>>;
}
constexpr LinearKernels kLinearAvx2 = {Few::quantize, multiply_words, Few::widen,  WordPieces::kRowBytes,
                                       1,             Few::nothing,   Few::nothing};
