/* SPDX-License-Identifier: Apache-2.0
 *
 * The small records of the store: meta, zones, changes; and addresses as the broker writes them.
 */
#include "fuzz.h"


int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static const int64_t times[] = {INT64_MIN, -62135596800, 0, 1732492800, INT64_MAX - 1};
	struct meta_record meta;
	struct moment moment;
	struct slice subject;
	int64_t from, until;
	uint64_t sequence;
	int32_t offset;
	uint8_t kind;
	char text[64];
	size_t i;

	(void)record__meta((struct slice){data, size}, &meta);
	for(i = 0; i < sizeof(times) / sizeof(times[0]); i++){
		if(record__zone((struct slice){data, size}, times[i], &offset, &from, &until)){
			MUST(from <= times[i] && times[i] < until && offset > -172800 && offset < 172800);
		}
	}
	if(size >= 8 && record__change((struct slice){data, 8}, (struct slice){data + 8, size - 8}, &sequence, &kind, &subject)){
		MUST(subject.len == size - 9);
	}
	if(size < sizeof(text)){
		memcpy(text, data, size);
		text[size] = '\0';
		MUST(decide__address(text, &moment) == (moment.family != 0));
	}
	return 0;
}
