/* SPDX-License-Identifier: Apache-2.0
 *
 * $share/GROUP/FILTER: what comes out is the end of what went in, and is none itself unless it was written so.
 */
#include "fuzz.h"


int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	const char *filter = (const char *)data;
	size_t len = size;

	if(topics__unshare(&filter, &len)){
		MUST(filter >= (const char *)data && filter + len == (const char *)data + size);
		MUST(filter == (const char *)data || (len > 0 && memcmp(data, "$share/", 7) == 0));
	}
	(void)topics__filter_ok(filter, len);
	(void)topics__name_ok(filter, len);
	return 0;
}
