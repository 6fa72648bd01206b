/* Runs an engine folder from C: the best ids and their log-probabilities at each mask, and what the other heads say.
 *
 *   fill_mask FOLDER MASK_ID ID...
 *
 * MASK_ID is the id of [MASK] in the model's vocabulary: 4 in the demo's, 103 in that of bert-base-cased. The demo on
 * "He opened the [MASK].":
 *   fill_mask demo-engine 4 2 476 1825 340 4 18 3
 * Build it with:
 *   cc fill_mask.c -I"$(python -c 'import bertrt; print(bertrt.get_include())')" \
 *      -L"$LIB" -Wl,-rpath,"$LIB" -lbertrt -lm -o fill_mask
 * where LIB is what bertrt.get_library_dir() returns.
 *
 * Text to ids is a tokenizer's business: the folder's tokenizer.json has a vocabulary for one. */
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "bertrt.h"

enum { TOP = 5 };

static int read_ids(int count, char** texts, int32_t* ids) {
  for (int i = 0; i < count; ++i) {
    char* end = NULL;
    errno = 0;
    const long value = strtol(texts[i], &end, 10);
    if (errno != 0 || *texts[i] == '\0' || *end != '\0' || value < INT32_MIN || value > INT32_MAX) {
      fprintf(stderr, "'%s' is not a token id\n", texts[i]);
      return 0;
    }
    ids[i] = (int32_t)value;
  }
  return 1;
}

/* Allocates `count` elements, or ends the program: an example need not go on without memory. */
static void* array(size_t count, size_t size) {
  void* memory = calloc(count == 0 ? 1 : count, size);
  if (memory == NULL) {
    fprintf(stderr, "out of memory\n");
    exit(1);
  }
  return memory;
}

static int answer(const bertrt_engine* engine, int32_t mask, const int32_t* ids, int64_t tokens) {
  bertrt_error error;
  bertrt_architecture sizes = BERTRT_ARCHITECTURE_INIT;
  if (bertrt_get_architecture(engine, &sizes, &error) != BERTRT_OK) {
    fprintf(stderr, "%s\n", error.message);
    return 1;
  }
  const size_t count = (size_t)tokens, hidden = (size_t)sizes.hidden_size;
  int32_t* const segments = array(count, sizeof *segments);
  int64_t* const positions = array(count, sizeof *positions);
  int64_t* const top_ids = array(count * TOP, sizeof *top_ids);
  float* const top_log_probs = array(count * TOP, sizeof *top_log_probs);
  float* const hidden_states = array(count * hidden, sizeof *hidden_states);
  float nsp_logits[2] = {0.0f, 0.0f};
  const int64_t offsets[] = {0, tokens};

  bertrt_batch batch = BERTRT_BATCH_INIT;
  batch.input_ids = ids;
  batch.token_type_ids = segments;
  batch.tokens = tokens;
  batch.offsets = offsets;
  batch.sequences = 1;

  bertrt_request request = BERTRT_REQUEST_INIT;
  request.hidden_states = hidden_states;
  if (sizes.has_nsp) request.nsp_logits = nsp_logits;
  if (sizes.has_mlm) {
    for (int64_t i = 0; i < tokens; ++i) {
      if (ids[i] == mask) positions[request.mlm_count++] = i;
    }
    request.mlm_positions = positions;
    request.top_k = TOP;
    request.top_ids = top_ids;
    request.top_log_probs = top_log_probs;
  }

  const bertrt_status status = bertrt_run(engine, &batch, &request, &error);
  if (status != BERTRT_OK) {
    fprintf(stderr, "%s\n", error.message);
  } else {
    for (int64_t i = 0; i < request.mlm_count; ++i) {
      printf("mask at %" PRId64 "\n", positions[i]);
      for (int64_t k = 0; k < TOP; ++k) {
        printf("  %" PRId64 " %.6f\n", top_ids[i * TOP + k], (double)top_log_probs[i * TOP + k]);
      }
    }
    if (sizes.has_nsp) printf("next sentence %.6f %.6f\n", (double)nsp_logits[0], (double)nsp_logits[1]);
    for (int64_t i = 0; i < tokens; ++i) {
      double squares = 0;
      for (size_t j = 0; j < hidden; ++j) {
        const double value = (double)hidden_states[(size_t)i * hidden + j];
        squares += value * value;
      }
      printf("length of feature %" PRId64 " %.6f\n", i, sqrt(squares));
    }
  }
  free(segments);
  free(positions);
  free(top_ids);
  free(top_log_probs);
  free(hidden_states);
  return status == BERTRT_OK ? 0 : 1;
}

int main(int argc, char** argv) {
  if (argc < 4) {
    fprintf(stderr, "usage: %s FOLDER MASK_ID ID...\n", argv[0]);
    return 2;
  }
  /* The first one is the mask's. */
  const int count = argc - 2;
  int32_t* const ids = array((size_t)count, sizeof *ids);
  if (!read_ids(count, argv + 2, ids)) {
    free(ids);
    return 2;
  }

  bertrt_error error;
  bertrt_engine* engine = NULL;
  int result = 1;
  if (bertrt_open(argv[1], NULL, &engine, &error) != BERTRT_OK) {
    fprintf(stderr, "%s\n", error.message);
  } else {
    printf("bertrt %s, %s, %" PRId32 " threads\n", bertrt_version(), bertrt_isa(engine), bertrt_threads(engine));
    result = answer(engine, ids[0], ids + 1, count - 1);
    bertrt_close(engine);
  }
  free(ids);
  return result;
}
