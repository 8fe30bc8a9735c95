// The kernels for bfloat16; a file a type, so that they compile side by side.
#include "tiles_cuda.h"

namespace hstu_cuda {

int forward_bfloat16(const Problem& problem, void* stream) { return forward_of<BFloat16>(problem, stream); }
int backward_bfloat16(const Problem& problem, void* stream) { return backward_of<BFloat16>(problem, stream); }

}  // namespace hstu_cuda
