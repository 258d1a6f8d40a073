/* SPDX-License-Identifier: Apache-2.0
 *
 * The record of a device, and the password that it holds: it parses or not, and what parses stays within itself.
 */
#include "fuzz.h"


static void within(struct slice part, const uint8_t *data, size_t size)
{
	MUST(part.at >= data && part.at + part.len <= data + size);
}


int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct device_record record;
	size_t i;

	if(!record__device((struct slice){data, size}, &record)){
		return 0;
	}
	for(i = 0; i < record.value_count; i++){
		within(record.values[i], data, size);
		MUST(record.values[i].len > 0 && !memchr(record.values[i].at, '/', record.values[i].len));
	}
	if(record.flags & FLAG_PASSWORD){
		within(record.hash, data, size);
		MUST(record.iterations <= RECORD_ITERATIONS_MAX);
		if(record.iterations < 200){
			MUST(!secret__password(&record, "a password that nobody has"));
		}
	}
	if(record.flags & FLAG_PSK){
		within(record.psk, data, size);
		MUST(record.psk.len >= RECORD_PSK_MIN);
	}
	return 0;
}
