/* environment.h - the environment variables of the CUDA side, read once, at first need.
 *
 * RADDLE_CACHE_DIR     folder of compiled kernels; empty: keep them in memory only
 * RADDLE_LOG           1: notices on stderr as they come; 2: also every kernel that is compiled or
 *                      loaded
 * RADDLE_CHECK         1: kernels report indices that are out of range
 * RADDLE_DISABLE_CUDA  1: there is no GPU, whatever the machine has
 */
#ifndef RADDLE_CUDA_ENVIRONMENT_H
#define RADDLE_CUDA_ENVIRONMENT_H

#include "base/status.h"

typedef struct raddle_environment {
    const char *cache_dir; /* RADDLE_CACHE_DIR, else below XDG_CACHE_HOME or HOME; "": none */
    const char *cuda_home; /* CUDA_HOME, "" when not set */
    const char *cuda_path; /* CUDA_PATH, "" when not set */
    int log_level;
    bool check;
    bool disable_cuda;
} raddle_environment;

const raddle_environment *raddle_environment_get(void);

#endif
