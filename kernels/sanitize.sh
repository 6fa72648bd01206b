#!/usr/bin/env bash
# Builds the kernels with sanitizers, and runs their tests and fuzzing on them.
#   kernels/sanitize.sh BUILD-FOLDER [WEIGHTS...]
# WEIGHTS are weight files (model.bertrt) larger than the seeds of the fuzzing, for test_engine.
set -euo pipefail
build=$1
shift
kernels=$(dirname "$0")

# Allocations that must fail are an error for the tests, not the end.
export ASAN_OPTIONS=allocator_may_return_null=1:detect_stack_use_after_return=1
export UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS=halt_on_error=1:allocator_may_return_null=1:die_after_fork=0

for sanitizer in address,undefined thread; do
  folder=$build/${sanitizer%%,*}
  echo "== $sanitizer"
  cmake -S "$kernels" -B "$folder" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DBERTRT_PYTHON=OFF \
    -DBERTRT_TESTS=ON -DBERTRT_WERROR=ON -DBERTRT_SANITIZE="$sanitizer"
  cmake --build "$folder"
  # ThreadSanitizer needs the memory layout that it was written for, which random addresses may miss.
  run=()
  if [ "$sanitizer" = thread ]; then run=(setarch --addr-no-randomize); fi
  "${run[@]}" ctest --test-dir "$folder" --no-tests=error --output-on-failure
  if [ $# -gt 0 ]; then "${run[@]}" "$folder/test_engine" "$@"; fi
done
