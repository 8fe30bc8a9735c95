// The kernels for float16; a file a type, so that they compile side by side.
#include "tiles_cuda.h"

namespace hstu_cuda {

int forward_float16(const Problem& problem, void* stream) { return forward_of<Float16>(problem, stream); }
int backward_float16(const Problem& problem, void* stream) { return backward_of<Float16>(problem, stream); }

}  // namespace hstu_cuda
