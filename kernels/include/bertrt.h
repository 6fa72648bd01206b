/* BertRT's C interface: open an engine folder that `bertrt export` wrote, run token ids through it.
 *
 * No function throws, prints or aborts. Those that can fail return a bertrt_status and, where the caller gives a
 * bertrt_error, write what was wrong into it. An engine may be used by many threads at once; an error belongs to the
 * caller. Arrays are C-contiguous, belong to the caller, and are checked before anything is computed.
 *
 * Each struct begins with its size as the caller's header knows it, so that programs compiled with one release go on
 * working with later ones: start from the *_INIT macros. */
#ifndef BERTRT_H
#define BERTRT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define BERTRT_API __attribute__((visibility("default")))
#else
#define BERTRT_API
#endif

typedef enum bertrt_status {
  BERTRT_OK = 0,
  BERTRT_INVALID_ARGUMENT = 1, /* an argument or an array that cannot be answered as it was given */
  BERTRT_NOT_FOUND = 2,        /* no such folder, or no weights for this library in it */
  BERTRT_BAD_FILE = 3,         /* a weight file that is corrupt, truncated, foreign or of another version */
  BERTRT_MISSING_HEAD = 4,     /* the checkpoint never had the head that was asked for */
  BERTRT_UNSUPPORTED = 5,      /* what this processor or this build lacks */
  BERTRT_OUT_OF_MEMORY = 6,
  BERTRT_SYSTEM = 7            /* the operating system refused something else */
} bertrt_status;

/* What was wrong, what was expected and what to do; an empty message after success. */
typedef struct bertrt_error {
  bertrt_status status;
  char message[512]; /* UTF-8, ends with a zero */
} bertrt_error;

typedef struct bertrt_engine bertrt_engine;

typedef struct bertrt_options {
  size_t struct_size;
  int32_t threads; /* of each run; 0: the processors that the process may use */
  int32_t pin;     /* 1: bind the library's threads to processors */
  int32_t verify;  /* 1: compare the checksums of the weights, which reads the whole file */
  int32_t huge_pages; /* 1: copy the weights into pages of 2 MB: short batches are faster, but no process shares them */
} bertrt_options;

#define BERTRT_OPTIONS_INIT {sizeof(bertrt_options), 0, 0, 1, 0}

typedef struct bertrt_architecture {
  size_t struct_size;
  int32_t hidden_size;
  int32_t num_hidden_layers;
  int32_t num_attention_heads;
  int32_t intermediate_size;
  int32_t vocab_size;
  int32_t max_position_embeddings; /* the longest sequence in tokens */
  int32_t type_vocab_size;         /* number of segments */
  float layer_norm_eps;
  int32_t has_mlm; /* 1 where there is the masked-LM head */
  int32_t has_nsp;
  int32_t has_pooler;
  char hidden_act[16]; /* "gelu", "gelu_new" or "relu" */
  char precision[8];   /* "fp32", "bf16" or "int8" */
} bertrt_architecture;

#define BERTRT_ARCHITECTURE_INIT {sizeof(bertrt_architecture), 0, 0, 0, 0, 0, 0, 0, 0.0f, 0, 0, 0, {0}, {0}}

/* Sequences laid end to end, without padding. Sequence i is tokens offsets[i] to offsets[i + 1] - 1; none is empty or
 * longer than the model's positions. Ids are WordPiece ids with the special tokens in place. */
typedef struct bertrt_batch {
  size_t struct_size;
  const int32_t* input_ids;      /* [tokens] */
  const int32_t* token_type_ids; /* [tokens] */
  int64_t tokens;
  const int64_t* offsets; /* [sequences + 1], from 0 to `tokens` */
  int64_t sequences;
} bertrt_batch;

#define BERTRT_BATCH_INIT {sizeof(bertrt_batch), NULL, NULL, 0, NULL, 0}

/* What to compute, and where to write it. A null output is not computed and costs nothing. Log-probabilities are
 * natural logarithms of the softmax over the whole vocabulary. */
typedef struct bertrt_request {
  size_t struct_size;
  const int64_t* mlm_positions; /* [mlm_count] tokens of the batch at which the masked-LM head runs, in any order */
  int64_t mlm_count;
  float* mlm_logits; /* [mlm_count][vocab_size] */
  int64_t top_k;
  int64_t* top_ids;           /* [mlm_count][top_k], best first, equals by rising id */
  float* top_log_probs;       /* [mlm_count][top_k] */
  const int64_t* candidates;  /* [mlm_count][candidate_count] ids */
  int64_t candidate_count;
  float* candidate_log_probs; /* [mlm_count][candidate_count] */
  float* hidden_states;       /* [tokens][hidden_size], last layer */
  float* pooled;              /* [sequences][hidden_size] */
  float* nsp_logits;          /* [sequences][2]: "B follows A", "B is random" */
  float* layers;              /* [num_hidden_layers + 1][tokens][hidden_size]: after the embeddings and each layer */
} bertrt_request;

#define BERTRT_REQUEST_INIT \
  {sizeof(bertrt_request), NULL, 0, NULL, 0, NULL, NULL, NULL, 0, NULL, NULL, NULL, NULL, NULL}

/* The library's release, such as "0.1.0". */
BERTRT_API const char* bertrt_version(void);

/* Opens an engine folder. `options` may be null for the defaults of BERTRT_OPTIONS_INIT, `error` if not wanted. On
 * failure *engine is null. The environment variable BERTRT_ISA names an instruction set to use instead of the best
 * one: amx, avx512-bf16, avx512-vnni, avx2-vnni, avx2 or portable. */
BERTRT_API bertrt_status bertrt_open(const char* folder, const bertrt_options* options, bertrt_engine** engine,
                                     bertrt_error* error);

/* Closes an engine that no run uses any more. Null is allowed. */
BERTRT_API void bertrt_close(bertrt_engine* engine);

/* Computes what is requested. On failure the outputs' contents are undefined. The same sequence gives the same answer,
 * bit for bit, in every batch and with any number of threads, on the same instruction set. */
BERTRT_API bertrt_status bertrt_run(const bertrt_engine* engine, const bertrt_batch* batch,
                                    const bertrt_request* request, bertrt_error* error);

/* The sizes of an engine's arrays; set `struct_size` before (BERTRT_ARCHITECTURE_INIT). */
BERTRT_API bertrt_status bertrt_get_architecture(const bertrt_engine* engine, bertrt_architecture* architecture,
                                                 bertrt_error* error);

/* The instruction set in use, such as "avx512-vnni"; "" for null. */
BERTRT_API const char* bertrt_isa(const bertrt_engine* engine);

/* Threads of each run; 0 for null. */
BERTRT_API int32_t bertrt_threads(const bertrt_engine* engine);

#ifdef __cplusplus
}
#endif

#endif /* BERTRT_H */
