/* nvrtc.h - CUDA's run-time compiler, opened when a kernel has to be compiled.
 *
 * Found by library.h's search. A copy of a CUDA major newer than the driver's is passed over: the
 * driver would refuse what it makes. Missing: RADDLE_ERR_COMPILE with the pip line that cures it
 * and the places that were looked at.
 */
#ifndef RADDLE_CUDA_NVRTC_H
#define RADDLE_CUDA_NVRTC_H

#include "base/status.h"

enum { RADDLE_NVRTC_MAX_ARCHS = 64 };

typedef struct raddle_nvrtc_info {
    const char *path;
    int version; /* 13050 for 13.5, as the driver counts */
    int num_archs;
    int archs[RADDLE_NVRTC_MAX_ARCHS]; /* compute capabilities it compiles for, ascending: 80, 90 */
} raddle_nvrtc_info;

typedef struct raddle_nvrtc_program {
    const char *name; /* of the file, in messages: "attention/attention_decode.cu" */
    const char *text;
    int num_headers;
    const char *const *header_names; /* as #include spells them */
    const char *const *header_texts;
    const char *const *options; /* NULL behind the last; the architecture is not among them */
    const char *arch;           /* "sm_90a": machine code; "compute_90": PTX */
} raddle_nvrtc_program;

/* What ptxas said about a kernel, summed over the log's entries. */
typedef struct raddle_nvrtc_report {
    int registers;
    int stack_bytes;
    int spill_store_bytes, spill_load_bytes;
    int num_serialised; /* warnings C75xx: wgmma put in line, or setmaxnreg ignored */
    int num_local;      /* warnings of local memory */
} raddle_nvrtc_report;

/* Opens the library at first use; the same answer ever after. */
raddle_status raddle_nvrtc_get(const raddle_nvrtc_info **out_info);
/* The version of the copy that would be opened, as far as file names tell it: 0 when they do not.
 * Opening maps 100 MB; a kernel that is on disk already does without. */
int raddle_nvrtc_peek_version(void);
/* "pip install ..": the wheel that fits the driver, or the newest when there is no driver. */
const char *raddle_nvrtc_cure(void);

/* The image is NUL-terminated behind its bytes (PTX is text). Image and log are the caller's to
 * raddle_free. A failure has NVRTC's first error in the message and the whole log with it. */
raddle_status raddle_nvrtc_compile(const raddle_nvrtc_program *program, void **out_image,
                                   size_t *out_bytes, char **out_log);
void raddle_nvrtc_parse_log(const char *log, raddle_nvrtc_report *out_report);

#endif
