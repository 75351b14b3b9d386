/* stream.h - streams of raddle's own, for callers that have no framework to bring one.
 *
 * On the CPU a stream is NULL: work there is done when a call returns.
 */
#ifndef RADDLE_RUNTIME_STREAM_H
#define RADDLE_RUNTIME_STREAM_H

#include "base/status.h"

/* Not ordered with the legacy default stream. high_priority: CTAs of its kernels are placed before
 * those of other streams that wait for an SM; none that runs is stopped. */
raddle_status raddle_stream_create(raddle_device device, bool high_priority,
                                   raddle_stream *out_stream);
/* Work that is queued still runs. NULL is ignored. */
void raddle_stream_destroy(raddle_device device, raddle_stream stream);
/* Waits for all that is queued. Refused while the stream, or a graph on this thread, is captured. */
raddle_status raddle_stream_synchronize(raddle_device device, raddle_stream stream);

#endif
