/* measure.c - reads memory as fast as the CPU's threads, or a GPU, can. */
#include "measure/measure.h"

#include "base/threads.h"
#include "cuda/kernel.h"
#include "kernels/measure/measure_params.h"

enum { BLOCK_WORDS = 1 << 15, LANES = 16, READ_THREADS = 512, READ_CTAS_PER_SM = 4 };

typedef struct checksum_job {
    const uint64_t *words;
    int64_t count;
    uint64_t sum;
} checksum_job;

static void read_share(void *context, int64_t begin, int64_t end, int worker) {
    checksum_job *job = context;
    uint64_t lanes[LANES] = {0};
    (void)worker;
    int64_t i = begin;
    for (; i + LANES <= end; i += LANES) {
        for (int lane = 0; lane < LANES; lane++) {
            lanes[lane] ^= job->words[i + lane];
        }
    }
    uint64_t sum = 0;
    for (; i < end; i++) {
        sum ^= job->words[i];
    }
    for (int lane = 0; lane < LANES; lane++) {
        sum ^= lanes[lane];
    }
    __atomic_xor_fetch(&job->sum, sum, __ATOMIC_RELAXED);
}

uint64_t raddle_measure_checksum(const void *data, size_t bytes) {
    checksum_job job = {.words = data, .count = (int64_t)(bytes / sizeof(uint64_t))};
    /* One long run per thread: hardware prefetchers follow streams, not blocks. */
    const int64_t share = job.count / raddle_threads_count() + 1;
    raddle_threads_for(read_share, &job, job.count, share > BLOCK_WORDS ? share : BLOCK_WORDS);
    return job.sum;
}

raddle_status raddle_measure_read(int32_t index, const void *data, size_t bytes,
                                  raddle_stream stream) {
    const raddle_cuda_device *device = NULL;
    RADDLE_TRY(raddle_cuda_device_get(index, &device));
    bool pushed = false;
    RADDLE_TRY(raddle_cuda_push(device, &pushed));
    const raddle_measure_params params = {.data = data, .chunks = (int64_t)(bytes / 16)};
    const raddle_launch launch = {
        .grid = {(unsigned)(device->num_sms * READ_CTAS_PER_SM), 1, 1},
        .block = {READ_THREADS, 1, 1},
    };
    const raddle_kernel *kernel = NULL;
    raddle_status status = raddle_kernel_get(device, "measure/measure_read", "", 0, &kernel);
    if (status == RADDLE_OK) {
        status = raddle_kernel_launch(device, kernel, &launch, &params, stream);
    }
    raddle_cuda_pop(device, pushed);
    return status;
}
