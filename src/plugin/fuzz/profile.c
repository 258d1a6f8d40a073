/* SPDX-License-Identifier: Apache-2.0
 *
 * The record of a profile: its grants are made, and questions are decided by them. The decision for a topic name must be
 * the one for the filter that matches this name alone.
 */
#include "fuzz.h"


static bool zone(void *context, uint32_t zone, int64_t at, int32_t *offset)
{
	(void)context;
	(void)at;
	*offset = (int32_t)(zone % 86400);
	return zone % 7 != 0;
}


int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static const char *const topics[] = {"sensors/temp-1/t", "a", "/", "$SYS/x", "halls/hall-1"};
	static const char *const filters[] = {"#", "sensors/+/t", "$share/g/sensors/#", "+/+", "$share/g"};
	static const struct slice values[] = {{(const uint8_t *)"hall-1", 6}, {(const uint8_t *)"1", 1}};
	const struct grant_source source = {{data, size}, values, 2};
	struct moment moments[] = {{.has_time = true, .now = 1732492800, .family = 4, .address = {10, 20, 1, 5}},
			{.has_time = true, .now = -1, .family = 6, .address = {0x20, 1}}, {.has_time = false}};
	struct grants *grants;
	size_t i, j;

	if(decide__grants(&source, 1, "temp-1", 6, &grants) != REASON_NONE){
		MUST(grants == NULL);
		return 0;
	}
	for(i = 0; i < grants->count; i++){
		MUST(topics__filter_ok(grants->list[i].filter, grants->list[i].filter_len));
	}
	for(j = 0; j < sizeof(moments) / sizeof(moments[0]); j++){
		for(i = 0; i < sizeof(topics) / sizeof(topics[0]); i++){
			size_t len = strlen(topics[i]);
			struct decision name, filter;

			decide__by(grants, ACCESS_PUBLISH, topics[i], len, &moments[j], zone, NULL);
			name = decide__by(grants, ACCESS_DELIVER, topics[i], len, &moments[j], zone, NULL);
			filter = decide__by(grants, ACCESS_SUBSCRIBE, topics[i], len, &moments[j], zone, NULL);
			MUST((name.reason == REASON_NONE) == (filter.reason == REASON_NONE) || name.reason == REASON_STORE
					|| filter.reason == REASON_STORE);
		}
		for(i = 0; i < sizeof(filters) / sizeof(filters[0]); i++){
			decide__by(grants, ACCESS_SUBSCRIBE, filters[i], strlen(filters[i]), &moments[j], zone, NULL);
		}
	}
	free(grants);
	return 0;
}
