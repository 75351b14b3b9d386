/* attention_plan.cu - makes the schedule of a batch whose lengths only the GPU has.
 *
 * What      header, requests, worker_indptr, segments and merges as attention_schedule.h defines
 *           them, and the page table, all at the plan's fixed addresses.
 * Grid      CTA 0 plans; the others copy the page table, whose length is read here. Blocks of
 *           RADDLE_PLAN_THREADS.
 * Shared    raddle_plan_space (attention_plan.h), dynamic.
 * Bound     latency: three scans and a dozen barriers of one CTA; a page table of 4 MB takes as
 *           long.
 * The launch is an ordinary one: it begins when its predecessors have ended.
 */
#include "attention/attention_plan.h"

extern "C" __global__ void __launch_bounds__(RADDLE_PLAN_THREADS)
    attention_plan(const __grid_constant__ raddle_attention_plan_params p) {
    extern __shared__ __align__(16) char shared[];
    if (blockIdx.x == 0) {
        raddle_plan_space space;
        raddle_plan_carve(shared, p.num_workers, RADDLE_PLAN_THREADS, &space);
        raddle_plan_batch(&p, &space, (int32_t)threadIdx.x, RADDLE_PLAN_THREADS);
        return;
    }
    const int64_t num_pages = raddle_plan_num_pages(&p);
    const int64_t stride = (int64_t)(gridDim.x - 1) * RADDLE_PLAN_THREADS;
    for (int64_t i = (int64_t)(blockIdx.x - 1) * RADDLE_PLAN_THREADS + threadIdx.x; i < num_pages;
         i += stride) {
        p.pages[i] = p.table[i];
    }
}
