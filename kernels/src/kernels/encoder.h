// The encoder on one chunk: embeddings and layers.
//
// The members of a group share each step (products by blocks of weights' panels, the rest by rows or heads) and meet
// at a barrier after it; a group of one runs through.
#pragma once

#include "../pool.h"
#include "attention.h"
#include "epilogue.h"
#include "rows.h"

namespace bertrt::BERTRT_ISA {
namespace {

template <class Storage>
inline int storage_pieces(int width) {
  return pieces_of<Storage>(static_cast<int>(round_up(width, 32)));
}

// Storage: what products read and attention gives (in an int8 model what is then quantised). Residual: the residual
// stream, and what is added to it. A bfloat16 model has a float32 residual: in bfloat16 it alone would cost more of the
// agreement with float32 than all else together (kernels/NOTES.md); an int8 model does not feel it.
template <class StorageType, class ResidualType>
class ChunkEncoder {
 public:
  using Storage = StorageType;
  using Residual = ResidualType;
  // Whether the products need a copy of the residual in their own type.
  static constexpr bool kCopies = sizeof(Storage) != sizeof(Residual);
  static constexpr bool kInt8 = sizeof(Residual) == 2;

  ChunkEncoder(const Model& model, const Chunk& chunk, const ChunkBuffers& buffers, const ThreadBuffers& scratch,
               Group& group, int rank)
      : model_(model),
        sizes_(model.architecture),
        chunk_(chunk),
        buffers_(buffers),
        scratch_(scratch),
        group_(group),
        rank_(rank),
        size_(group.size()),
        inner_(sizes_.heads * sizes_.padded_head_size),
        hidden_(tiled(buffers.hidden, storage_pieces<Residual>(sizes_.hidden))),
        input_(kCopies ? tiled(buffers.quantized, storage_pieces<Storage>(sizes_.hidden)) : hidden_),
        context_(tiled(buffers.context, storage_pieces<Storage>(inner_))),
        result_(tiled(buffers.result, storage_pieces<Residual>(sizes_.hidden))),
        wide_(tiled(buffers.wide, storage_pieces<Storage>(sizes_.intermediate))) {}

  void run() {
    embed();
    group_.barrier();
    capture(0);
    for (int layer = 0; layer < sizes_.layers; ++layer) {
      attention(model_.layers[layer]);
      feed_forward(model_.layers[layer], layer + 1 < sizes_.layers ? &model_.layers[layer + 1] : nullptr);
      capture(layer + 1);
    }
    give_out();
  }

 private:
  // Rows so few that the weights come more slowly than they are multiplied, and how much of the next product's may wait in the
  // L2 cache.
  static constexpr int32_t kFewRows = 64;
  static constexpr int64_t kMostAhead = 256 * 1024;

  // Rows of int8 with the scale of each, for a matrix with `steps` pieces.
  Rows quantized(int steps) const { return kInt8 ? tiled(buffers_.quantized, steps) : Rows{}; }
  Range rows_of_mine() const { return share(chunk_.rows, size_, rank_); }

  void embed() {
    const int width = static_cast<int>(round_up(sizes_.hidden, 64));
    float* x = scratch_.rows;
    for (int32_t s = 0; s < chunk_.sequence_count; ++s) {
      const Sequence& sequence = chunk_.sequences[s];
      const Range mine = rows_of_mine();
      const int64_t begin = mine.begin > sequence.row ? mine.begin : sequence.row;
      const int64_t end = mine.end < sequence.row + sequence.length ? mine.end : sequence.row + sequence.length;
      for (int64_t row = begin; row < end; ++row) {
        const int64_t position = row - sequence.row;
        const int64_t token = sequence.begin + position;
        word_row(model_.words, chunk_.ids[token], x);
        const float* place = model_.position_table + position * width;
        const float* segment = model_.segment_table + static_cast<int64_t>(chunk_.segments[token]) * width;
        // The word's row is as long as its pieces; the others may be longer.
        const int have = model_.words.steps * 16 * (model_.words.dtype == Dtype::kInt8 ? 4
                                                    : model_.words.dtype == Dtype::kBfloat16 ? 2 : 1);
        F total = zero();
        for (int i = 0; i < width; i += kWidth) {
          const F word = i < have ? load(x + i) : zero();
          const F value = add(word, add(load(place + i), load(segment + i)));
          store(x + i, value);
          total = add(total, value);
        }
        const float totals[1] = {sum(total)};
        normalize<1>(totals, model_.embedding_norm_gamma, model_.embedding_norm_beta, model_.layers[0].qkv.steps, row);
      }
    }
  }

  // Of the rows in scratch_.rows.
  template <int kRows>
  void normalize(const float* totals, const float* gamma, const float* beta, int next_steps, int64_t row) {
    const Norm norm{sizes_.hidden, sizes_.norm_epsilon, gamma, beta};
    const NormOutputs outputs{hidden_, kCopies ? input_ : Rows{}, quantized(next_steps), next_steps,
                              buffers_.row_scale};
    normalize_rows<kRows, Residual, Storage>(scratch_.rows, totals, norm, outputs, row);
  }

  // This member's share of a matrix.
  Panels mine_of(const Matrix& w) const { return {0, w.panel_count, size_, rank_}; }

  // Weights are what short batches wait for: while a member does something else, it touches those that it reads next.
  void touch(int lines) {
    if (chunk_.rows <= kFewRows) ahead_.touch(lines);
  }

  // Output of a product in rows `to`, with what follows it; then `next` is read, if it is not null.
  template <class Out, After kAfter>
  void product(const Matrix& w, const Panels& panels, const Rows& storage_input, const void* bytes, const Steps& steps,
               const Rows& to, const Matrix* next, const Panels& panels_of_next) {
    ahead_ = next == nullptr ? Ahead{} : panels_of_next.ahead(*next, chunk_.rows);
    if (ahead_.end - ahead_.next > kMostAhead) ahead_.end = ahead_.next + kMostAhead;
    constexpr Next kNext = kInt8 ? Next::kInt8 : sizeof(Out) == 2 ? Next::kBfloat16 : Next::kFloat32;
    if constexpr (kInt8) {
      const StorePieces<Out, true, kAfter, kNext> out{to, {buffers_.row_scale, w.scale, w.bias}};
      multiply_part<Int8Product>(tiled(bytes, w.steps), chunk_.rows, w, offset_of(steps), panels, scratch_.block, out,
                                 ahead_);
    } else {
      const StorePieces<Out, false, kAfter, kNext> out{to, {nullptr, nullptr, w.bias}};
      multiply_part<typename ProductOf<Storage>::type>(storage_input, chunk_.rows, w, 0, panels, scratch_.block, out,
                                                       ahead_);
    }
  }
  template <class Out, After kAfter>
  void product(const Matrix& w, const Rows& storage_input, const void* bytes, const Steps& steps, const Rows& to,
               const Matrix* next) {
    product<Out, kAfter>(w, mine_of(w), storage_input, bytes, steps, to, next, next == nullptr ? Panels{} : mine_of(*next));
    group_.barrier();
  }

  void quantize(const Rows& from, int width, void* to, int steps, const Steps& how) {
    if constexpr (kInt8) {
      const Rows bytes = tiled(to, steps);
      by_rows<8>(rows_of_mine(), [&](int64_t row, auto count) {
        touch(16 * count.value);
        quantize_rows<count.value>(from, storage_pieces<Storage>(width), bytes, steps, how, buffers_.row_scale, row);
      });
      group_.barrier();
    }
  }

  // hidden = LayerNorm(hidden + result)
  void add_and_normalize(const float* gamma, const float* beta, int next_steps) {
    by_rows<2>(rows_of_mine(), [&](int64_t row, auto count) {
      float totals[count.value];
      touch(32 * count.value);
      add_rows<count.value, Residual, Residual>(hidden_, result_, row, sizes_.hidden, scratch_.rows, totals);
      normalize<count.value>(totals, gamma, beta, next_steps, row);
    });
    group_.barrier();
  }

  void attention(const Layer& weights) {
    using Head = Operand<Storage>;
    // Rows whose stride is a multiple of 2 KB would share their cache sets.
    const size_t stride = static_cast<size_t>(round_up(static_cast<int64_t>(3 * inner_ * sizeof(Head)), 64)) + 64;
    const Rows qkv = row_major(buffers_.qkv, stride);
    const Matrix& w = weights.qkv;
    const Matrix& next = weights.attention_out;
    if (by_heads()) {
      for (int part = 0; part < 3; ++part) {
        const bool last = part == 2;
        product<Head, After::kNothing>(w, heads_of_mine(part), input_, buffers_.quantized, kSymmetric, qkv,
                                       last ? &next : &w, last ? mine_of(next) : heads_of_mine(part + 1));
      }
      const Range heads = share(sizes_.heads, size_, rank_);
      for (int32_t s = 0; s < chunk_.sequence_count; ++s) {
        const Sequence& sequence = chunk_.sequences[s];
        for (int64_t head = heads.begin; head < heads.end; ++head) {
          attend_one<Head>(stride, sequence, static_cast<int>(head), 0, sequence.length);
        }
      }
    } else {
      product<Head, After::kNothing>(w, input_, buffers_.quantized, kSymmetric, qkv, &next);
      attend_all<Head>(stride);
    }
    group_.barrier();
    quantize(context_, inner_, buffers_.quantized, next.steps, kSymmetric);
    product<Residual, After::kNothing>(next, context_, buffers_.quantized, kSymmetric, result_, &weights.ffn_in);
    add_and_normalize(weights.attention_norm_gamma, weights.attention_norm_beta, weights.ffn_in.steps);
  }

  // Whether each member computes queries, keys and values of its own heads, which then nobody waits for. Uneven shares would
  // cost more than that.
  bool by_heads() const { return size_ > 1 && sizes_.heads % size_ == 0; }
  // The panels of this member's heads: queries (0), keys (1) or values (2).
  Panels heads_of_mine(int part) const {
    const int panels = sizes_.padded_head_size / 32, own = sizes_.heads / size_;
    return {(part * sizes_.heads + rank_ * own) * panels, own * panels, 1, 0};
  }

  template <class Head>
  void attend_all(size_t stride) {
    const int heads = sizes_.heads;
    const int64_t tasks = static_cast<int64_t>(chunk_.sequence_count) * heads;
    // With few heads for many members, several share one and each takes some of its queries.
    const int split = size_ > 1 && tasks < 4 * size_ ? 2 : 1;
    const Range mine = share(tasks * split, size_, rank_);
    for (int64_t task = mine.begin; task < mine.end; ++task) {
      const Sequence& sequence = chunk_.sequences[task / split / heads];
      const int turn = static_cast<int>(task % split);
      const int blocks = (sequence.length + 31) / 32;
      const int begin = blocks * turn / split * 32;
      const int end = turn + 1 == split ? sequence.length : blocks * (turn + 1) / split * 32;
      if (begin < end) attend_one<Head>(stride, sequence, static_cast<int>(task / split % heads), begin, end);
    }
  }

  template <class Head>
  void attend_one(size_t stride, const Sequence& sequence, int head, int begin, int end) {
    const int depth = sizes_.padded_head_size;
    touch(128);
    attend<Head, Storage>(static_cast<const char*>(buffers_.qkv) + static_cast<size_t>(sequence.row) * stride +
                              static_cast<size_t>(head) * depth * sizeof(Head),
                          stride, static_cast<size_t>(inner_) * sizeof(Head), sequence.length, begin, end,
                          sizes_.head_size, depth, context_, sequence.row, head * depth / kPiece<Storage>, scratch_);
  }

  // `next`: the layer after this one, or null.
  void feed_forward(const Layer& weights, const Layer* next) {
    const Matrix& in = weights.ffn_in;
    const Matrix& out = weights.ffn_out;
    switch (sizes_.activation) {
      case Activation::kGelu:
        product<Storage, After::kGelu>(in, input_, buffers_.quantized, kSymmetric, wide_, &out);
        break;
      case Activation::kGeluNew:
        product<Storage, After::kGeluNew>(in, input_, buffers_.quantized, kSymmetric, wide_, &out);
        break;
      case Activation::kRelu:
        product<Storage, After::kRelu>(in, input_, buffers_.quantized, kSymmetric, wide_, &out);
        break;
    }
    const Steps steps = steps_after(sizes_.activation);
    quantize(wide_, sizes_.intermediate, buffers_.wide_quantized, out.steps, steps);
    const Panels panels = next == nullptr ? Panels{} : by_heads() ? heads_of_mine(0) : mine_of(next->qkv);
    product<Residual, After::kNothing>(out, mine_of(out), wide_, buffers_.wide_quantized, steps, result_,
                                       next == nullptr ? nullptr : &next->qkv, panels);
    group_.barrier();
    add_and_normalize(weights.ffn_norm_gamma, weights.ffn_norm_beta, weights.qkv.steps);
  }

  // States after the embeddings (0) or a layer, for those who look inside.
  void capture(int index) {
    if (chunk_.layers == nullptr) return;
    put_rows(chunk_.layers + static_cast<int64_t>(index) * chunk_.tokens * sizes_.hidden);
    group_.barrier();
  }

  void put_rows(float* to) const {
    const Range mine = rows_of_mine();
    for (int32_t s = 0; s < chunk_.sequence_count; ++s) {
      const Sequence& sequence = chunk_.sequences[s];
      const int64_t begin = mine.begin > sequence.row ? mine.begin : sequence.row;
      const int64_t end = mine.end < sequence.row + sequence.length ? mine.end : sequence.row + sequence.length;
      for (int64_t row = begin; row < end; ++row) {
        copy_out<Residual>(hidden_, row, sizes_.hidden, to + (sequence.begin + row - sequence.row) * sizes_.hidden);
      }
    }
  }

  void give_out() const {
    if (chunk_.hidden != nullptr) put_rows(chunk_.hidden);
    const int pieces = storage_pieces<Storage>(sizes_.hidden);
    const Range masked = share(chunk_.mlm_count, size_, rank_);
    for (int64_t i = masked.begin; i < masked.end; ++i) {
      copy_row(input_, chunk_.mlm[i].row, tiled(chunk_.mlm_rows, pieces), chunk_.mlm[i].target, pieces);
    }
    const Range pooled = share(chunk_.pooled_count, size_, rank_);
    for (int64_t i = pooled.begin; i < pooled.end; ++i) {
      copy_row(input_, chunk_.pooled[i].row, tiled(chunk_.pooled_rows, pieces), chunk_.pooled[i].target, pieces);
    }
    group_.barrier();
  }

  const Model& model_;
  const Architecture& sizes_;
  const Chunk& chunk_;
  const ChunkBuffers& buffers_;
  const ThreadBuffers& scratch_;
  Group& group_;
  const int rank_;
  const int size_;
  const int inner_;
  const Rows hidden_, input_, context_, result_, wide_;
  Ahead ahead_{};  // weights of this member's next product
};

void encode(const Model& model, const Chunk& chunk, const ChunkBuffers& buffers, const ThreadBuffers& scratch,
            Group& group, int rank) {
  switch (model.architecture.precision) {
    case Precision::kFloat32:
      ChunkEncoder<float, float>(model, chunk, buffers, scratch, group, rank).run();
      break;
    case Precision::kBfloat16:
      ChunkEncoder<Bf16, float>(model, chunk, buffers, scratch, group, rank).run();
      break;
    case Precision::kInt8:
      ChunkEncoder<Bf16, Bf16>(model, chunk, buffers, scratch, group, rank).run();
      break;
  }
}

}  // namespace
}  // namespace bertrt::BERTRT_ISA
