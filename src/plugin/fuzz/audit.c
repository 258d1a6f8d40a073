/* SPDX-License-Identifier: Apache-2.0
 *
 * A line of the audit with text of a client: printable ASCII in one line, short enough, and closed as it was opened.
 */
#include "fuzz.h"


int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	char line[AUDIT_LINE], *text = malloc(size + 1);
	struct audit_event event = {.event = "refused", .action = "publish", .reason = REASON_DENIED};
	size_t len, i, quotes = 0;

	MUST(text);
	memcpy(text, data, size);
	text[size] = '\0';
	event.device = event.client_id = event.address = event.topic = event.rule = text;
	event.rule_len = strlen(text) < 255 ? strlen(text) : 255;
	len = audit__format(&event, 7, line);
	MUST(len < AUDIT_LINE - 1 && line[len] == '\0' && line[len - 1] == '}');
	for(i = 0; i < len; i++){
		MUST(line[i] >= 0x20 && line[i] < 0x7F);
		if(line[i] == '\\'){
			i++;
		}else if(line[i] == '"'){
			quotes++;
		}
	}
	/* Four for each of the nine names with text, two more for a number's. */
	MUST(quotes == 4 * 9 + 2);
	free(text);
	return 0;
}
