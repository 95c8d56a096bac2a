"""timed.py FILE COMMAND...: runs a command, and writes the processor seconds that it took to FILE."""

import os
import sys

pid = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(pid, 0)
code = os.waitstatus_to_exitcode(status)
if code == 0:
    with open(sys.argv[1], "w") as file:
        file.write(f"{usage.ru_utime + usage.ru_stime:.2f}\n")
sys.exit(code if code >= 0 else 128 - code)
