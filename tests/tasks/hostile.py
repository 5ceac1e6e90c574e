"""Programs that no one should run outside the sandbox, by kind: (source, what the verdict must match).

Every source is followed by tests that fail, so none may pass; where what it tries is refused without ending it, the
verdict is that those tests ran. TAG, HOST (the caller's process), PORT (somebody listens there) and CANARY (a file) are
filled in; a new process or file carries TAG in its name.
"""

TESTS = "\n\nassert False, 'the tests ran'\n"
RAN, LATE, FULL = "failed: AssertionError: the tests ran", "timeout", "out of memory"
EARLY, FORKS = "exited before the tests ended", "BlockingIOError"


def program(source, **names):
    for name, value in names.items():
        source = source.replace(name, str(value))
    return "import os, sys, time\n" + source + TESTS


def tried(*lines):
    """Each line on its own, its errors swallowed."""
    return "\n".join(f"try:\n    {line}\nexcept BaseException: pass" for line in lines)


DETACH = "if not os.fork():\n    os.setsid()\n    if not os.fork():\n        {}\n    os._exit(0)\n"
SLEEP = "os.execv('/usr/bin/sleep', ['sleep', '1000', 'TAG'])"
SEARCH = """
def hidden(frame):
    while frame:
        yield from frame.f_locals.values()
        frame = frame.f_back
found = [v for v in hidden(sys._getframe()) if isinstance(v, bytes)]
found += [x for v in hidden(sys._getframe()) if isinstance(v, list) for x in v if isinstance(x, bytes)]
"""
REFUSED = "import ctypes\nassert ctypes.CDLL(None).{} == 0, 'no'"
SHOUT = "for fd in range(3, 64):\n    try: os.write(fd, {})\n    except OSError: pass\n"

KINDS = {
    "fork bomb": [
        ("while True: os.fork()", f"{FORKS}|{LATE}"),
        ("while True:\n" + "    try: os.fork()\n    except OSError: pass", LATE),
        ("def f():\n    os.fork(); f()\nf()", f"{FORKS}|{LATE}"),
        ("while True:\n    try:\n        if not os.fork(): os.setsid()\n    except OSError: pass", LATE),
        ("import multiprocessing as m\nwhile True: m.get_context('fork').Process(target=time.sleep, args=(9,)).start()", FORKS),
        ("import subprocess\nwhile True: subprocess.Popen(['/usr/bin/sleep', '1000', 'TAG'])", FORKS),
        ("while os.fork() or True:\n    try: os.posix_spawn('/usr/bin/yes', ['yes', 'TAG'], {})\n    except OSError: pass",
         f"{FORKS}|{LATE}"),
        ("import signal\nsignal.signal(signal.SIGCHLD, lambda *_: os.fork())\nfor i in range(9): os.fork()",
         f"{FORKS}|{RAN}|cannot be shown|{EARLY}"),  # its handler may go off while the runner words what it raised
    ],
    "thread bomb": [
        ("import threading\nwhile True: threading.Thread(target=time.sleep, args=(9,)).start()", "start new thread"),
        ("import threading\nwhile True: threading.Thread(target=time.sleep, args=(9,), daemon=True).start()", "start new"),
        ("import _thread\nwhile True: _thread.start_new_thread(time.sleep, (9,))", "start new thread"),
        ("import _thread\nwhile True:\n    try: _thread.start_new_thread(time.sleep, (9,))\n    except RuntimeError: pass",
         f"{LATE}|{FULL}"),
        ("from concurrent.futures import *\np = ThreadPoolExecutor(999)\nfor i in range(999): p.submit(time.sleep, 9)",
         "start new thread"),
    ],
    "endless loop": [
        ("while True: pass", LATE),
        ("import itertools\nfor i in itertools.count(): pass", LATE),
        ("sum(range(10**15))", LATE),
        ("import re\nre.match('(a+)+$', 'a' * 99 + 'b')", LATE),
        ("10 ** 10 ** 9", LATE),
        ("while True:\n    try: time.sleep(9)\n    except BaseException: pass", LATE),
        ("import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except Exception: pass\n"
         "while True: pass", LATE),
        ("class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E", LATE),
    ],
    "sleep": [
        ("time.sleep(1e6)", LATE),
        ("import signal\nsignal.pause()", LATE),
        ("import threading\nthreading.Event().wait()", LATE),
        ("os.read(os.pipe()[0], 1)", LATE),
        ("import select\nselect.select([], [], [])", LATE),
        ("import signal\nos.kill(os.getpid(), signal.SIGSTOP)", LATE),
    ],
    "outlives its parent": [
        (DETACH.format(SLEEP), RAN),
        (DETACH.format(SLEEP) + "os._exit(0)", EARLY),
        (DETACH.format("while True: pass"), RAN),
        (DETACH.format("while True: pass") + "sys.exit()", EARLY),
        (DETACH.format("time.sleep(1000)") + "time.sleep(1000)", LATE),
        ("import subprocess\nsubprocess.Popen(['/usr/bin/nohup', '/usr/bin/sleep', '1000', 'TAG'], start_new_session=True)", RAN),
        ("import atexit\natexit.register(os.fork)\natexit.register(time.sleep, 1000)", RAN),
        ("import threading\nthreading.Thread(target=time.sleep, args=(1000,)).start()", RAN),
    ],
    "memory": [
        ("x = bytearray(10 * 2**30)", FULL),
        ("x = 'x' * (10 * 2**30)", FULL),
        ("x = [0]\nwhile True: x += x", FULL),
        ("x = []\nwhile True: x.append(bytearray(2**20))", FULL),
        ("x = {}\nwhile True: x[len(x)] = ' ' * 2**16", FULL),
        ("import mmap\nmmap.mmap(-1, 10 * 2**30)", "Cannot allocate memory"),
        ("x = 1\nwhile True:\n    try: x = [x] * 2**22\n    except MemoryError: pass", LATE),
        ("f = os.memfd_create('x')\nwhile True: os.write(f, bytes(2**20))", "OSError: .*File too large"),
    ],
    "files": [
        ("with open('TAG', 'wb') as f:\n    while True: f.write(bytes(2**20))", "OSError: .*(too large|No space)"),
        ("for i in range(99):\n    with open(f'TAG{i}', 'wb') as f: f.write(bytes(2**20))", "OSError: .*No space"),
        ("for i in range(10**6): open(f'TAG{i}', 'w').close()", "OSError: .*No space"),
        ("for i in range(10**6): os.mkdir(f'TAG{i}'); os.chdir(f'TAG{i}')", "OSError: .*No space"),
        ("open('CANARY', 'w').write('dead')", "FileNotFoundError"),
        ("os.remove('CANARY')", "FileNotFoundError"),
        ("open('/..CANARY', 'w').write('dead')", "FileNotFoundError"),  # what may lie over the root is above it
        (tried("os.symlink('CANARY', 'l')", "open('l', 'w').write('dead')", "os.link('CANARY', 'm')"), RAN),
        (tried(*(f"open('{f}/TAG', 'w')" for f in ("/", "/usr", "/root", "/home", "/var/tmp", "/dev/shm", "/dev"))), RAN),
        ("import shutil\nshutil.rmtree('/', ignore_errors=True)", RAN),
        ("os.remove(os.__file__)", "OSError: .*Read-only"),
        ("os.chmod('/usr/bin/sleep', 0o777)", "OSError: .*Read-only"),
        ("os.mknod('disk', 0o60666, os.makedev(254, 0))", "PermissionError"),
        ("os.truncate('/dev/zero', 10**12); os.chroot('.')", "Error"),
    ],
    "signals": [
        ("os.kill(-1, 9)", f"{RAN}|signal 9|ProcessLookup"),
        ("os.kill(HOST, 9)", "ProcessLookupError"),
        ("os.kill(os.getppid(), 9)", RAN),
        ("os.kill(os.getppid(), 19)", RAN),
        ("os.killpg(0, 9)", "signal 9"),
        (tried(*(f"os.kill({p}, {s})" for p in (1, -1) for s in (1, 2, 15, 10, 20, 64))), f"{RAN}|signal"),
        ("for p in range(3, 70000):\n    try: os.kill(p, 9)\n    except ProcessLookupError: pass", RAN),
    ],
    "rights": [
        (REFUSED.format("ptrace(16, 1, 0, 0)"), "AssertionError: no"),
        (REFUSED.format("unshare(0x10000000)"), "AssertionError: no"),
        (REFUSED.format("unshare(0x20000)"), "AssertionError: no"),
        (REFUSED.format("mount(b'none', b'/tmp', b'tmpfs', 0, b'')"), "AssertionError: no"),
        (REFUSED.format("mount(b'/', b'/', None, 4128, b'')"), "AssertionError: no"),  # bind, remount, no longer read-only
        (REFUSED.format("umount2(b'/tmp', 2)"), "AssertionError: no"),
        ("os.setuid(0)", "Error"),
        ("import resource as r\nr.setrlimit(r.RLIMIT_NPROC, (999, 999))", "ValueError|PermissionError"),
        ("import resource as r\nr.prlimit(1, r.RLIMIT_CPU, (0, 0))", f"{RAN}|signal|Error"),
    ],
    "output": [
        ("while True: print('x' * 10**6)", LATE),
        ("while True: os.write(2, bytes(10**6))", LATE),
        ("while True: print('x' * 10**6, file=sys.stderr, flush=True)", LATE),
        ("raise ValueError('x' * 10**8)", "failed: ValueError: x{50,200}$"),
        ("raise type('X' * 10**6, (Exception,), {})('\\x1b[2J\\nTAG\\0' * 99)", "failed: X{100}: "),
        ("import warnings\nwhile True: warnings.warn('x' * 10**6, stacklevel=1)", f"{LATE}|{FULL}"),
    ],
    "network": [
        ("import socket\nsocket.create_connection(('127.0.0.1', PORT))", "OSError|ConnectionRefused"),
        ("import socket\nsocket.create_connection(('198.51.100.1', 80))", "OSError: .*unreachable"),
        ("import socket\nsocket.create_connection(('::1', PORT))", "OSError|ConnectionRefused"),
        ("import socket\nsocket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('198.51.100.1', 53))", "OSError: .*unreachable"),
        ("import socket\nsocket.socket(socket.AF_UNIX).connect(chr(0) + 'TAG')", "ConnectionRefused"),
        ("import socket\nsocket.getaddrinfo('example.com', 80)", "gaierror"),
        ("import urllib.request\nurllib.request.urlopen('http://127.0.0.1:PORT')", "URLError"),
        ("import socket\nsocket.socket(socket.AF_INET, socket.SOCK_RAW, 1)", "PermissionError"),
    ],
    "stdin": [
        ("input()", "EOFError"),
        ("assert sys.stdin.read(), 'empty'", "AssertionError: empty"),
        ("while not os.read(0, 9): pass", LATE),
        ("open('/dev/stdin')", "FileNotFoundError"),
        ("open('/dev/tty')", "FileNotFoundError"),
    ],
    "leaves early": [
        ("exit(0)", EARLY),
        ("quit()", EARLY),
        ("sys.exit(0)", EARLY),
        ("os._exit(0)", EARLY),
        ("raise SystemExit", EARLY),
        ("class E(SystemExit): pass\nraise E('passed')", EARLY),
        ("import threading\nthreading.Thread(target=os._exit, args=(0,)).start(); time.sleep(9)", EARLY),
        ("os.execv('/usr/bin/true', ['true'])", EARLY),
        ("os.abort()", "signal 6"),
        ("os.kill(os.getpid(), 9)", "signal 9"),
        ("import ctypes\nctypes.string_at(0)", "signal 11"),
        ("if os.fork(): os._exit(0)", EARLY),
    ],
    "false proof": [
        ("print('passed'); print('{\"reason\": \"passed\"}', flush=True)", RAN),
        (SHOUT.format("b'passed'"), "wrote into"),
        (SHOUT.format("b'+' + bytes(16) + b'passed'"), "wrote into"),
        (SHOUT.format("b'{\"reason\": \"passed\"}\\n'"), "wrote into"),
        (SEARCH + "for f in found:\n    " + SHOUT.format("f + b'passed'").replace("\n", "\n    ") + "\nos._exit(0)", EARLY),
        ("import __main__\n__main__._outcome = __main__._reason = lambda *_: b'passed'", RAN),
        ("write = os.write\nos.write = lambda f, b: write(f, b[:16] + b'passed')", RAN),
        ("os.closerange(3, 64)", EARLY),
        ("if not os.fork(): raise SystemExit\nos.wait()", RAN),
        ("class E(Exception):\n    def __str__(self): return type('S', (str,), {'encode': lambda *a: b'passed'})('')\nraise E",
         "failed: E"),
    ],
    "replaced builtins": [
        ("import builtins\nbuiltins.exec = builtins.compile = builtins.BaseException = builtins.MemoryError = None", RAN),
        ("import builtins\nbuiltins.AssertionError = StopIteration", RAN),
        ("import builtins\nbuiltins.SystemExit = builtins.Exception = AssertionError", RAN),
        ("sys.excepthook = lambda *_: os._exit(0)", RAN),
        ("import atexit\natexit.register(os._exit, 0)", RAN),
        ("sys.stdout.close(); sys.stderr.close(); os.closerange(0, 3)", RAN),
        ("sys.modules.clear()", RAN),
        ("__name__ = '__main__'; __debug = False; sys.dont_write_bytecode = True", RAN),
    ],
    "depth": [
        ("def f(): f()\nf()", "RecursionError"),
        ("sys.setrecursionlimit(10**9)\nclass A:\n    def __getattr__(self, n): return getattr(self, n)\nA().x",
         f"signal 11|{FULL}|{LATE}|RecursionError"),
        ("x = eval('(' * 10**5 + ')' * 10**5)", f"Error|{FULL}"),
        ("x = ()\nfor i in range(10**6): x = (x,)\ndel x", RAN),
        ("import json\njson.loads('[' * 10**6)", "RecursionError"),
    ],
}  # fmt: skip
