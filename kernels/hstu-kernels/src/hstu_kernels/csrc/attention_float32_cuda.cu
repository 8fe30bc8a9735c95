// The kernels for float32; a file a type, so that they compile side by side.
#include "tiles_cuda.h"

namespace hstu_cuda {

int forward_float32(const Problem& problem, void* stream) { return forward_of<float>(problem, stream); }
int backward_float32(const Problem& problem, void* stream) { return backward_of<float>(problem, stream); }

}  // namespace hstu_cuda
