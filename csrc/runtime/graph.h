/* graph.h - CUDA graphs: captured work, and the plans that it reads.
 *
 * CAPTURING (begin .. end, one thread) -> READY -> STALE (a captured plan was given a batch beyond
 * its maxima; sticky). FAILED, for good: the capture failed or was aborted, or a launch was answered
 * that work queued before had failed (RADDLE_ERR_CUDA_ASYNC); what the driver answers for a launch
 * itself leaves the graph READY. A capture by somebody else (torch.cuda.graph) is not seen here:
 * runs are capture-safe by themselves, but nothing holds their plans then, and launches are not
 * ordered behind updates on other streams.
 */
#ifndef RADDLE_RUNTIME_GRAPH_H
#define RADDLE_RUNTIME_GRAPH_H

#include "runtime/plan.h"

typedef struct raddle_graph raddle_graph;

typedef enum raddle_graph_state {
    RADDLE_GRAPH_CAPTURING = 0,
    RADDLE_GRAPH_READY,
    RADDLE_GRAPH_STALE,
    RADDLE_GRAPH_FAILED
} raddle_graph_state;

/* Captures what this thread launches between begin and end, to be launched again as one. stream
 * NULL: a stream of the graph's own (the legacy default stream cannot be captured);
 * raddle_graph_stream tells it. CUDA only. Between begin and end nothing may be planned, allocated
 * or waited for. Plans that run are kept alive by the graph and may be updated between launches
 * within their maxima; tensors stay the caller's to keep alive. */
raddle_status raddle_graph_begin(raddle_device device, raddle_stream stream,
                                 raddle_graph **out_graph);
/* On the thread that began. A failure leaves a graph that is only good for destroy. */
raddle_status raddle_graph_end(raddle_graph *graph);
/* Ends the capture and forgets what was captured; on the thread that began. */
void raddle_graph_abort(raddle_graph *graph);
/* Waits on stream for the last update of every captured plan, then runs the graph there. Updates of
 * those plans must be ordered behind it by the caller if they go to another stream.
 * RADDLE_ERR_STATE when a plan was refused for capacity since the capture: the graph is stale,
 * capture anew. RADDLE_ERR_CUDA_ASYNC leaves it FAILED. */
raddle_status raddle_graph_launch(raddle_graph *graph, raddle_stream stream);
raddle_stream raddle_graph_stream(const raddle_graph *graph);
void raddle_graph_destroy(raddle_graph *graph);

raddle_graph_state raddle_graph_get_state(const raddle_graph *graph);
/* The graph that this thread captures, or NULL. */
raddle_graph *raddle_graph_current(void);
/* Called by every run of a plan: the graph that this thread captures, if any, keeps the plan. */
raddle_status raddle_graph_note_plan(raddle_plan *plan);

#endif
