/* SPDX-License-Identifier: Apache-2.0
 *
 * What the fuzz targets have in common. One file for each parser, named after what it feeds; its seeds lie in
 * seeds/NAME. With clang they run under libFuzzer, with any compiler replay.c plays the seeds and what was found.
 */
#ifndef BEDNET_FUZZ_H
#define BEDNET_FUZZ_H

#include "../bednet.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Stops the run: something holds that must not. */
#define MUST(condition) \
	do{ \
		if(!(condition)){ \
			abort(); \
		} \
	}while(0)

#endif
