// The heads, on rows that were gathered: masked LM with a streaming top k, pooler, next sentence.
//
// The decoder goes over the vocabulary in tasks of kDecodeColumns, each of which leaves a maximum and a sum of
// exponentials for each row, and the k best so far. The tasks, and the order in which their sums are added, are the
// same whatever the number of threads.
#pragma once

#include "encoder.h"

namespace bertrt::BERTRT_ISA {
namespace {

// A token that may be among the best k; `before` orders best first, equals by rising id.
struct Scored {
  float value;
  int32_t id;
};
inline bool before(const Scored& a, const Scored& b) { return a.value > b.value || (a.value == b.value && a.id < b.id); }

// A heap whose first element is the worst of those kept.
inline void sink(Scored* heap, int32_t size, int32_t at) {
  const Scored item = heap[at];
  for (;;) {
    int32_t child = 2 * at + 1;
    if (child >= size) break;
    if (child + 1 < size && before(heap[child], heap[child + 1])) ++child;
    if (!before(item, heap[child])) break;
    heap[at] = heap[child];
    at = child;
  }
  heap[at] = item;
}
inline void keep_best(Scored* heap, int32_t* size, int64_t limit, const Scored& item) {
  if (*size < limit) {
    int32_t at = (*size)++;
    while (at > 0 && before(heap[(at - 1) / 2], item)) {
      heap[at] = heap[(at - 1) / 2];
      at = (at - 1) / 2;
    }
    heap[at] = item;
  } else if (before(item, heap[0])) {
    heap[0] = item;
    sink(heap, *size, 0);
  }
}
// Orders a heap best first.
inline void sort_heap(Scored* heap, int32_t size) {
  while (size > 1) {
    const Scored worst = heap[0];
    heap[0] = heap[--size];
    sink(heap, size, 0);
    heap[size] = worst;
  }
}

template <class T>
class MlmHead {
 public:
  using Storage = T;

  MlmHead(const Model& model, const MlmBlock& block, const MlmBuffers& buffers, const ThreadBuffers& scratch,
          Group& group, int rank)
      : model_(model),
        sizes_(model.architecture),
        block_(block),
        buffers_(buffers),
        scratch_(scratch),
        group_(group),
        rank_(rank),
        size_(group.size()),
        tasks_((sizes_.vocab + kDecodeColumns - 1) / kDecodeColumns) {}

  void run() {
    switch (sizes_.activation) {
      case Activation::kGelu:
        transform<After::kGelu>();
        break;
      case Activation::kGeluNew:
        transform<After::kGeluNew>();
        break;
      case Activation::kRelu:
        transform<After::kRelu>();
        break;
    }
    for (int row = 0; row < block_.count; ++row) *heap_size(rank_, row) = 0;
    const Range mine = share(tasks_, size_, rank_);
    for (int64_t task = mine.begin; task < mine.end; ++task) decode(static_cast<int>(task));
    if (block_.top_k > 0) {
      for (int row = 0; row < block_.count; ++row) sort_heap(heap(rank_, row), *heap_size(rank_, row));
    }
    group_.barrier();
    const Range rows = share(block_.count, size_, rank_);
    for (int64_t row = rows.begin; row < rows.end; ++row) finish(static_cast<int>(row));
    group_.barrier();
  }

 private:
  Scored* heap(int rank, int row) const {
    return static_cast<Scored*>(buffers_.heaps) + (static_cast<int64_t>(rank) * kHeadRows + row) * block_.top_k;
  }
  int32_t* heap_size(int rank, int row) const {
    return buffers_.heap_sizes + static_cast<int64_t>(rank) * kHeadRows + row;
  }

  // hidden = LayerNorm(activation(dense(rows))), quantised too where the decoder is int8.
  template <After kAfter>
  void transform() {
    const int pieces = storage_pieces<Storage>(sizes_.hidden);
    const Matrix& dense = model_.mlm_dense;
    const Rows result = tiled(buffers_.transformed, storage_pieces<float>(sizes_.hidden));
    const StorePieces<float, false, kAfter, Next::kFloat32> out{result, {nullptr, nullptr, dense.bias}};
    Ahead decoder = decoder_ahead(static_cast<int>(share(tasks_, size_, rank_).begin));
    multiply_part<typename ProductOf<Storage>::type>(tiled(block_.rows, pieces), block_.count, dense, 0,
                                                     Panels{0, dense.panel_count, size_, rank_}, scratch_.block, out,
                                                     decoder);
    group_.barrier();
    const Range rows = share(block_.count, size_, rank_);
    const int steps = model_.mlm_decoder.steps;
    const bool int8 = model_.mlm_decoder.dtype == Dtype::kInt8;
    const Norm norm{sizes_.hidden, sizes_.norm_epsilon, model_.mlm_norm_gamma, model_.mlm_norm_beta};
    const NormOutputs outputs{tiled(buffers_.chunk.hidden, pieces), Rows{},
                              int8 ? tiled(buffers_.chunk.quantized, steps) : Rows{}, steps, buffers_.chunk.row_scale};
    by_rows<2>(rows, [&](int64_t row, auto count) {
      float totals[count.value];
      add_rows<count.value, float, float>(result, Rows{}, row, sizes_.hidden, scratch_.rows, totals);
      normalize_rows<count.value, Storage, Storage>(scratch_.rows, totals, norm, outputs, row);
    });
    group_.barrier();
  }

  // The panels of a task, and all behind them.
  Ahead decoder_ahead(int task) const {
    const Matrix& w = model_.mlm_decoder;
    const int first = task * (kDecodeColumns / 32) < w.panel_count ? task * (kDecodeColumns / 32) : w.panel_count;
    return Panels{first, w.panel_count - first, 1, 0}.ahead(w, block_.count);
  }

  void decode(int task) {
    const Matrix& w = model_.mlm_decoder;
    Ahead following = decoder_ahead(task + 1);
    const int first = task * kDecodeColumns;
    const int columns = sizes_.vocab - first < kDecodeColumns ? sizes_.vocab - first : kDecodeColumns;
    const int first_panel = first / 32, panels = (columns + 31) / 32;
    const Rows logits = row_major(scratch_.logits, kLogitStride * sizeof(float));
    if (w.dtype == Dtype::kInt8) {
      const StorePieces<float, true, After::kNothing, Next::kFloat32> out{
          logits, {buffers_.chunk.row_scale, w.scale, w.bias}, first_panel};
      multiply_part<Int8Product>(tiled(buffers_.chunk.quantized, w.steps), block_.count, w, offset_of(kSymmetric),
                                 Panels{first_panel, panels, 1, 0}, scratch_.block, out, following);
    } else {
      const StorePieces<float, false, After::kNothing, Next::kFloat32> out{
          logits, {nullptr, nullptr, w.bias}, first_panel};
      multiply_part<typename ProductOf<Storage>::type>(
          tiled(buffers_.chunk.hidden, storage_pieces<Storage>(sizes_.hidden)), block_.count, w, 0,
          Panels{first_panel, panels, 1, 0}, scratch_.block, out, following);
    }
    for (int row = 0; row < block_.count; ++row) {
      const float* values = scratch_.logits + static_cast<int64_t>(row) * kLogitStride;
      if (block_.logits != nullptr) {
        __builtin_memcpy(block_.logits + static_cast<int64_t>(row) * sizes_.vocab + first, values,
                         static_cast<size_t>(columns) * sizeof(float));
      }
      if (block_.top_k > 0 || block_.candidate_count > 0) measure(task, row, values, columns);
      if (block_.top_k > 0) collect(row, values, first, columns);
      for (int64_t i = 0; i < block_.candidate_count; ++i) {
        const int64_t id = block_.candidates[row * block_.candidate_count + i];
        if (id >= first && id < first + columns) {
          block_.candidate_log_probs[row * block_.candidate_count + i] = values[id - first];
        }
      }
    }
  }

  void measure(int task, int row, const float* values, int columns) {
    float most = values[0];
    const int whole = columns / kWidth * kWidth;
    if (whole > 0) {
      F m = load(values);
      for (int i = kWidth; i < whole; i += kWidth) m = max(m, load(values + i));
      most = largest(m);
    }
    for (int i = whole; i < columns; ++i) most = values[i] > most ? values[i] : most;
    const F shift = set(-most * kLog2E), by = set(kLog2E);
    F total = zero();
    for (int i = 0; i < whole; i += kWidth) total = add(total, exp2<true>(fma(load(values + i), by, shift)));
    if (whole < columns) {
      const F rest = exp2<true>(fma(load_first(values + whole, columns - whole), by, shift));
      total = add(total, keep_first(rest, columns - whole));
    }
    buffers_.maximum[static_cast<int64_t>(row) * tasks_ + task] = most;
    buffers_.sum[static_cast<int64_t>(row) * tasks_ + task] = sum(total);
  }

  void collect(int row, const float* values, int first, int columns) {
    Scored* best = heap(rank_, row);
    int32_t* size = heap_size(rank_, row);
    for (int i = 0; i < columns; i += kWidth) {
      const int left = columns - i;
      if (*size == block_.top_k && left >= kWidth && !any_greater(load(values + i), set(best[0].value))) continue;
      for (int j = i; j < i + kWidth && j < columns; ++j) {
        keep_best(best, size, block_.top_k, Scored{values[j], first + j});
      }
    }
  }

  // Log of the sum of all exponentials, then what was asked for.
  void finish(int row) {
    if (block_.top_k == 0 && block_.candidate_count == 0) return;
    const float* maximum = buffers_.maximum + static_cast<int64_t>(row) * tasks_;
    const float* sums = buffers_.sum + static_cast<int64_t>(row) * tasks_;
    float most = maximum[0];
    for (int task = 1; task < tasks_; ++task) most = maximum[task] > most ? maximum[task] : most;
    double total = 0;
    for (int task = 0; task < tasks_; ++task) {
      total += static_cast<double>(sums[task]) * __builtin_exp(static_cast<double>(maximum[task]) - most);
    }
    const double log_total = most + __builtin_log(total);
    for (int64_t i = 0; i < block_.candidate_count; ++i) {
      float* value = block_.candidate_log_probs + row * block_.candidate_count + i;
      *value = static_cast<float>(*value - log_total);
    }
    // The members' lists are sorted: the head of the first becomes the best of all heads each time.
    int32_t* places = scratch_places();
    for (int rank = 0; rank < size_; ++rank) places[rank] = 0;
    for (int64_t i = 0; i < block_.top_k; ++i) {
      int from = -1;
      for (int rank = 0; rank < size_; ++rank) {
        if (places[rank] >= *heap_size(rank, row)) continue;
        if (from < 0 || before(heap(rank, row)[places[rank]], heap(from, row)[places[from]])) from = rank;
      }
      if (from < 0) break;
      const Scored& item = heap(from, row)[places[from]++];
      block_.top_ids[row * block_.top_k + i] = item.id;
      block_.top_log_probs[row * block_.top_k + i] = static_cast<float>(item.value - log_total);
    }
  }

  // One number for each member; the scratch for logits is free by then.
  int32_t* scratch_places() const { return reinterpret_cast<int32_t*>(scratch_.logits); }

  const Model& model_;
  const Architecture& sizes_;
  const MlmBlock& block_;
  const MlmBuffers& buffers_;
  const ThreadBuffers& scratch_;
  Group& group_;
  const int rank_;
  const int size_;
  const int tasks_;
};

void mlm(const Model& model, const MlmBlock& block, const MlmBuffers& buffers, const ThreadBuffers& scratch,
         Group& group, int rank) {
  if (model.architecture.precision == Precision::kFloat32) {
    MlmHead<float>(model, block, buffers, scratch, group, rank).run();
  } else {
    MlmHead<Bf16>(model, block, buffers, scratch, group, rank).run();
  }
}

template <class Storage>
void pool_rows(const Model& model, const PoolBlock& block, const ThreadBuffers& scratch, Group& group, int rank) {
  const Architecture& sizes = model.architecture;
  const Matrix& dense = model.pooler_dense;
  const StoreExactly<false, After::kTanh> out{block.pooled, sizes.hidden, sizes.hidden, {nullptr, nullptr, dense.bias}};
  Ahead nothing{};
  multiply_part<typename ProductOf<Storage>::type>(tiled(block.rows, storage_pieces<Storage>(sizes.hidden)), block.count,
                                                   dense, 0, Panels{0, dense.panel_count, group.size(), rank},
                                                   scratch.block, out, nothing);
  group.barrier();
  if (block.nsp == nullptr) return;
  const int64_t width = round_up(sizes.hidden, 64);
  const Range rows = share(block.count, group.size(), rank);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const float* x = block.pooled + row * sizes.hidden;
    for (int answer = 0; answer < 2; ++answer) {
      const float* w = model.nsp_weight + answer * width;
      F total = zero();
      for (int i = 0; i < sizes.hidden; i += kWidth) {
        total = fma(load_first(x + i, sizes.hidden - i), load(w + i), total);
      }
      block.nsp[row * 2 + answer] = sum(total) + model.nsp_bias[answer];
    }
  }
  group.barrier();
}

void pool(const Model& model, const PoolBlock& block, const ChunkBuffers&, const ThreadBuffers& scratch, Group& group,
          int rank) {
  if (model.architecture.precision == Precision::kFloat32) {
    pool_rows<float>(model, block, scratch, group, rank);
  } else {
    pool_rows<Bf16>(model, block, scratch, group, rank);
  }
}

}  // namespace
}  // namespace bertrt::BERTRT_ISA
