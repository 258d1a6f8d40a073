/* SPDX-License-Identifier: Apache-2.0
 *
 * A broker's clock that a test sets: loaded before all else (LD_PRELOAD), it answers time() and CLOCK_REALTIME with the
 * second that stands first in the file BEDNET_TEST_CLOCK, or with the real time where that is 0. All other clocks are ahead
 * by the seconds that stand second. For tests only; nothing of it is in a package.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static const volatile int64_t *told;


__attribute__((constructor)) static void begin(void)
{
	const char *path = getenv("BEDNET_TEST_CLOCK");
	int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
	void *at;

	if(file == -1){
		abort();
	}
	at = mmap(NULL, 2 * sizeof(*told), PROT_READ, MAP_SHARED, file, 0);
	close(file);
	if(at == MAP_FAILED){
		abort();
	}
	told = at;
}


int clock_gettime(clockid_t clock, struct timespec *out)
{
	int64_t second = told ? *told : 0;

	if(clock == CLOCK_REALTIME && second){
		out->tv_sec = second;
		out->tv_nsec = 0;
		return 0;
	}
	if(syscall(SYS_clock_gettime, clock, out) != 0){
		return -1;
	}
	if(clock != CLOCK_REALTIME && told){
		out->tv_sec += told[1];
	}
	return 0;
}


time_t time(time_t *out)
{
	struct timespec now = {0, 0};

	if(clock_gettime(CLOCK_REALTIME, &now) != 0){
		return -1;
	}
	if(out){
		*out = now.tv_sec;
	}
	return now.tv_sec;
}
