/* scratch.h - the work space of cublasLt, per device. Two calls that may overlap never share a
 * block.
 *
 * A call on a stream uses that stream's block: the stream orders them. Calls that are captured use
 * one block of their own for all graphs of the device, since a graph may be launched on any stream;
 * raddle_graph_launch orders launches of such graphs behind each other with _enter and _leave. What
 * somebody else captures (torch.cuda.graph) is not ordered by us: its owner launches such graphs
 * one after the other.
 */
#ifndef RADDLE_CUDA_SCRATCH_H
#define RADDLE_CUDA_SCRATCH_H

#include "cuda/device.h"

/* The device's context must be current. Allocates at the first call for a stream, also during a
 * capture (which that does not disturb). */
raddle_status raddle_cuda_scratch_get(const raddle_cuda_device *device, raddle_stream stream,
                                      void **out_data, size_t *out_bytes);
/* Whether the capture of this thread took the graphs' block since raddle_cuda_set_capturing(true).
 */
bool raddle_cuda_scratch_is_captured(void);
/* Around the launch on stream of a graph that uses the block. leave follows every enter that went
 * well, whatever the launch did. */
raddle_status raddle_cuda_scratch_enter(const raddle_cuda_device *device, raddle_stream stream);
raddle_status raddle_cuda_scratch_leave(const raddle_cuda_device *device, raddle_stream stream);

#endif
