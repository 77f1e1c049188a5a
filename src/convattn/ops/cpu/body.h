// The kernels, once for each path: see kernels.cpp.

namespace CONVATTN_PATH {

#include "vectors.h"
#include "maps.h"
#include "forward.h"
#include "backward.h"
#include "small.h"

}  // namespace CONVATTN_PATH
