/* SPDX-License-Identifier: Apache-2.0
 *
 * Plays files, or all files of folders, into a fuzz target.
 */
#include "fuzz.h"

#include <dirent.h>
#include <limits.h>
#include <stdio.h>

#define SIZE_MAX_INPUT (1 << 20) /* bytes */


static int play(const char *path, unsigned int *played)
{
	static uint8_t data[SIZE_MAX_INPUT];
	char inner[PATH_MAX];
	struct dirent *entry;
	DIR *folder = opendir(path);
	FILE *file;
	size_t size;
	int rc = 0;

	if(folder){
		while(rc == 0 && (entry = readdir(folder))){
			if(entry->d_name[0] != '.'){
				int len = snprintf(inner, sizeof(inner), "%s/%s", path, entry->d_name);

				rc = len < 0 || (size_t)len >= sizeof(inner) ? 1 : play(inner, played);
			}
		}
		closedir(folder);
		return rc;
	}
	file = fopen(path, "rb");
	if(file == NULL){
		perror(path);
		return 1;
	}
	size = fread(data, 1, sizeof(data), file);
	fclose(file);
	{
		/* As large as it is and no larger, so that the sanitizer sees a step beyond its end. */
		uint8_t *copy = malloc(size ? size : 1);

		if(copy == NULL){
			return 1;
		}
		memcpy(copy, data, size);
		LLVMFuzzerTestOneInput(copy, size);
		free(copy);
	}
	++*played;
	return 0;
}


int main(int argc, char **argv)
{
	unsigned int played = 0;
	int i;

	for(i = 1; i < argc; i++){
		if(play(argv[i], &played)){
			return 1;
		}
	}
	printf("%s: %u inputs played\n", argv[0], played);
	return played ? 0 : 1;
}
