#include "ops/matrix.h"

#include "core/checked.h"

namespace llama_ext {

void check_map(const Matrix& matrix, const RowMap& map, int64_t rows, const char* op) {
  require(map.begin >= 0 && map.group > 0 && map.stride >= 0 && rows >= 0, ErrorKind::kShape, op,
          ": the row map must not be negative, got begin ", map.begin, ", group ", map.group, ", stride ", map.stride,
          " for ", rows, " rows");
  if (rows == 0) return;
  require(rows <= map.group || map.stride >= map.group, ErrorKind::kShape, op, ": the row map has groups of ",
          map.group, " rows that start ", map.stride, " apart");
  const int64_t groups = (rows - 1) / map.group;
  checked_add(checked_add(map.begin, checked_mul(groups, map.stride, op), op), rows, op);
  if (map(rows - 1) < matrix.rows()) return;  // later rows of a tensor come later in the matrix
  int64_t first = 0;
  while (map(first) < matrix.rows()) ++first;
  fail(ErrorKind::kShape, op, ": row ", first, " belongs at row ", map(first), " of a matrix with ", matrix.rows(),
       " rows");
}

}  // namespace llama_ext
