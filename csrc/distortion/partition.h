// Which weights leave at which sparsity.
#pragma once

#include <cstdint>
#include <vector>

namespace fitcompress {

// class_of[i] = the first k with i among the dropped[k] elements of lowest importance, or
// dropped.size() if it is never dropped. Ties in importance: the lower index leaves first.
// importance ≥ 0, no NaN; dropped ascending; at most 65534 of them.
void classify_by_importance(const float* importance, int64_t count,
                            const std::vector<int64_t>& dropped, uint16_t* class_of);

}  // namespace fitcompress
