/* graph.h - CUDA graphs: what the rest of the core must know of a capture.
 *
 * CAPTURING (begin .. end, one thread) -> READY -> STALE (a captured plan was given a batch beyond
 * its maxima; sticky). A capture that failed or was aborted is FAILED. The public functions are in
 * raddle.h. A capture by somebody else (torch.cuda.graph) is not seen here: runs are capture-safe
 * by themselves, but nothing holds their plans then, and launches are not ordered behind updates on
 * other streams.
 */
#ifndef RADDLE_RUNTIME_GRAPH_H
#define RADDLE_RUNTIME_GRAPH_H

#include "runtime/plan.h"

typedef enum raddle_graph_state {
    RADDLE_GRAPH_CAPTURING = 0,
    RADDLE_GRAPH_READY,
    RADDLE_GRAPH_STALE,
    RADDLE_GRAPH_FAILED
} raddle_graph_state;

raddle_graph_state raddle_graph_get_state(const raddle_graph *graph);
/* The graph that this thread captures, or NULL. */
raddle_graph *raddle_graph_current(void);
/* Called by every run of a plan: the graph that this thread captures, if any, keeps the plan. */
raddle_status raddle_graph_note_plan(raddle_plan *plan);

#endif
