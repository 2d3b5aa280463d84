"""
The table of signatures, in order of precedence: the first that is found in a line counts. No torch.

Signatures with `seen=False` were written from published reports, since they need hardware or permissions that tests lack.
"""

from __future__ import annotations

from typing import Final

from shoal.report.causes.signatures import Signature, signature

_LESS_MEMORY: Final = (
    "lower train.micro_batch, set train.activation_checkpointing to full, or shard with parallel.dp_shard; "
    "shoal config RECIPE shows the memory of a process"
)
_BAD_GPU: Final = "exclude the node, and report it to the cluster's staff; shoal doctor checks its GPUs"
_PROGRAM: Final = "set CUDA_LAUNCH_BLOCKING=1 to find the operator; if it fails on one node only, exclude that node"
_NETWORK: Final = "check the interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME) and the firewall; shoal doctor tests all pairs of nodes"
_DISK: Final = "shoal doctor --shared DIR checks the disk on every node"

# What the kernel and Slurm report.
OUTSIDE: Final[tuple[Signature, ...]] = (
    signature(
        "kernel out of memory",
        r"(?:Memory cgroup out of memory|Out of memory): Kill(?:ed)? process (?P<pid>\d+)|was killed by the kernel \(out of memory\)",
        "was killed by the kernel because memory ran out",
        f"request more memory (--mem); or {_LESS_MEMORY}",
        kind="outside",
    ),
    signature(
        "slurm out of memory",
        r"oom[-_]kill event|task \d+(?:-\d+)?: Out Of Memory|[Ee]xceeded (?:job|step) memory limit|exceeded memory limit \(",
        "was killed because the job used more memory than Slurm granted",
        f"request more memory (--mem); or {_LESS_MEMORY}",
        kind="outside",
        seen=False,
    ),
    signature(
        "time limit",
        r"(?:CANCELLED AT (?P<at>\S+) )?DUE TO TIME LIMIT",
        "was ended by Slurm at the job's time limit",
        "request more time (--time), or signal the job earlier so that it can save and be requeued",
        kind="outside",
    ),
    signature(
        "preempted",
        r"(?:CANCELLED AT (?P<at>\S+) )?DUE TO PREEMPTION",
        "was preempted by another job",
        "submit with --requeue; the next job resumes from the last checkpoint",
        kind="outside",
        seen=False,
    ),
    signature(
        "node failure",
        r"(?:JOB|STEP) \S+ ON (?P<node>\S+) CANCELLED AT (?P<at>\S+) DUE TO NODE FAILURE|[Nn]ode failure on (?P<nodes>\S+)",
        "was lost: Slurm reports a failed node",
        "exclude that node (--exclude) if this happens again",
        kind="outside",
    ),
    signature(
        "requeued",
        r"CANCELLED AT (?P<at>\S+) DUE TO JOB REQUEUE",
        "was ended because the job was requeued, by a user or for a job of higher priority",
        kind="outside",
    ),
    signature(
        "cancelled",
        r"(?:JOB|STEP) \S+ ON (?P<node>\S+) CANCELLED AT (?P<at>\S+) \*\*\*",
        "was cancelled, by scancel or by an administrator",
        kind="outside",
    ),
    signature(
        "gpu off the bus",
        r"NVRM: Xid \((?P<pci>[^)]*)\): (?P<xid>79)\b|[Gg]PU has fallen off the bus|fallen off the bus and is not responding",
        "lost a GPU: it has fallen off the bus",
        f"the node needs a reboot, perhaps a repair; {_BAD_GPU}",
        kind="outside",
        seen=False,
    ),
    signature(
        "gpu error",
        r"NVRM: Xid \((?P<pci>[^)]*)\): (?P<xid>\d+)\b",
        "had the GPU error Xid {xid} ({pci})",
        _BAD_GPU,
        kind="outside",
        seen=False,
    ),
    signature(
        "hardware error",
        r"\[Hardware Error\].*(?:[Uu]ncorrect|[Ff]atal)|Kernel panic|[Uu]ncorrected hardware memory error",
        "had a hardware error, reported by the kernel",
        "exclude the node, and report it to the cluster's staff",
        kind="outside",
        seen=False,
    ),
    signature(
        "disk error",
        r"I/O error, dev (?P<device>\S+)|EXT4-fs error|XFS \S+ .*(?:[Ss]hut|I/O error)|nfs: server (?P<server>\S+) not responding|LustreError",
        "had an error of a disk or of a shared file system, reported by the kernel",
        _DISK,
        kind="outside",
        seen=False,
    ),
)

_GPU: Final[tuple[Signature, ...]] = (
    signature(
        "gpu out of memory",
        r"CUDA out of memory|OutOfMemoryError|out of memory: Tried to allocate .* GPU|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|HIP out of memory",
        "ran out of GPU memory",
        _LESS_MEMORY,
        seen=False,
    ),
    signature(
        "gpu memory error",
        r"uncorrectable ECC error|CUDA_ERROR_ECC_UNCORRECTABLE|cudaErrorECCUncorrectable",
        "had an uncorrectable error of its GPU's memory (ECC)",
        _BAD_GPU,
        seen=False,
    ),
    signature(
        "index out of range on the gpu",
        r"device-side assert triggered|Assertion `.*(?:index out of bounds|srcIndex < srcSelectDimSize).*` failed",
        "used an invalid index on its GPU (device-side assert)",
        f"often a token id beyond model.vocab_size; {_PROGRAM}",
        seen=False,
    ),
    signature(
        "illegal gpu access",
        r"an illegal memory access was encountered|misaligned address|an illegal instruction was encountered",
        "accessed invalid memory on its GPU",
        _PROGRAM,
        seen=False,
    ),
    signature(
        "no gpu",
        r"no CUDA-capable device|Found no NVIDIA driver|CUDA driver version is insufficient|driver on your system is too old|"
        r"there is no CUDA device|invalid device ordinal|busy or unavailable|No CUDA GPUs are available|not compiled with CUDA|system not yet initialized",
        "found no usable GPU",
        "check --gpus-per-node, the driver and CUDA_VISIBLE_DEVICES; shoal doctor counts the GPUs of each node",
    ),
    signature(
        "gpu library",
        r"(?P<status>CU(?:BLAS|DNN|SOLVER|SPARSE)_STATUS_(?!SUCCESS)\w+)",
        "had an error in a GPU library ({status})",
        _PROGRAM,
        seen=False,
    ),
    signature(
        "cuda error",
        r"(?P<text>(?:CUDA error: |Cuda failure ).{1,120})",
        "had an error of its GPU: {text}",
        _PROGRAM,
        seen=False,
    ),
)

_NCCL: Final[tuple[Signature, ...]] = (
    signature(
        "nccl timeout",
        r"Watchdog caught collective operation timeout: WorkNCCL\(SeqNum=(?P<work>\d+), OpType=(?P<operation>\w+)"
        r"|last enqueued NCCL work: (?P<enqueued>\d+)",
        "waited too long for other ranks in a collective (NCCL)",
        "the rank that did not join is the one to look at; shoal doctor tests all pairs of nodes",
        kind="follows",
        seen=False,
    ),
    signature(
        "nccl watchdog",
        r"ProcessGroupNCCL's watchdog|[Ww]atchdog (?:thread )?got stuck|Heartbeat monitor timed out|taking the entire process down",
        "was ended by NCCL's watchdog",
        kind="follows",
        seen=False,
    ),
    signature(
        "two ranks on one gpu",
        r"Duplicate GPU detected",
        "used the same GPU as another rank",
        "start one process for each GPU; check CUDA_VISIBLE_DEVICES and --gpus-per-task",
        seen=False,
    ),
    signature(
        "nccl interface",
        r"Bootstrap : no socket interface found|no interface found for|No interface found in the same subnet",
        "found no network interface for NCCL",
        "set NCCL_SOCKET_IFNAME to the interface that the nodes share",
        seen=False,
    ),
    signature(
        "shared memory",
        r"[Ee]rror while creating shared memory segment|unable to .{0,60}</torch_|out of shared memory"
        r"|/dev/shm\S*'?: No space left|No space left on device: '?/dev/shm",
        "had no room in shared memory (/dev/shm)",
        "make /dev/shm larger (in a container: --shm-size), or remove old files there",
    ),
    signature(
        "infiniband",
        r"NET/IB ?: .*Got completion from peer (?P<peer>\S+) with (?:status|error)[= ]*(?P<status>\d+)|NET/IB ?: .*(?:port|device) .*(?:DOWN|error)",
        "lost an InfiniBand connection",
        "if no other process failed first, exclude the node or its peer; shoal doctor tests all pairs of nodes",
        kind="follows",
        seen=False,
    ),
    signature(
        "nccl connection",
        r"socketStartConnect: Connect to (?P<peer>\S+) failed|socketPollConnect.*(?:fail|timed out|No route|returned)",
        "could not connect to another process (NCCL)",
        _NETWORK,
        kind="follows",
        seen=False,
    ),
    signature(
        "nccl lost peer",
        r"ncclRemoteError|remote process exit(?:ed|ing)|NCCL communicator was aborted|Connection closed by remote peer"
        r"|NCCL WARN .*Call to (?:recv|send|recvmsg) .*failed",
        "lost the connection to another process (NCCL)",
        _NETWORK,
        kind="follows",
        seen=False,
    ),
    signature(
        "nccl error",
        r"(?P<error>ncclSystemError|ncclInternalError|ncclInvalidUsage|ncclInvalidArgument|ncclUnhandledCudaError)",
        "had an error in NCCL ({error})",
        "set NCCL_DEBUG=WARN to see its reason",
        seen=False,
    ),
)

_PEERS: Final[tuple[Signature, ...]] = (
    signature(
        "gloo timeout",
        r"Timed out waiting \d+ ?ms for (?:recv|send|barrier)\w* operation|gloo.*[Tt]imed out",
        "waited too long for other ranks in a collective (gloo)",
        "the rank that did not join is the one to look at",
        kind="follows",
    ),
    signature(
        "gloo interface",
        r"Unable to find (?:address|interface) for: (?P<name>[^\s.]+)|Unable to resolve hostname to a \(local\) address"
        r"|makeDeviceForInterface\(\): unsupported",
        "found no network interface for gloo",
        "set GLOO_SOCKET_IFNAME to the interface that the nodes share",
    ),
    signature(
        "gloo lost peer",
        r"gloo/.*(?:Connection closed by peer|Connection reset by peer|Broken pipe|Connection refused|connectFullMesh)"
        r"|Connection closed by peer \[|lost another process of this run",
        "lost the connection to another process",
        kind="follows",
    ),
    signature(
        "port in use",
        r"EADDRINUSE|Address already in use|address already in use|port (?P<port>\d+) is (?:already )?in use",
        "found its port in use",
        "choose another launch.rendezvous port, or launch.port 0; another job may run on the same node",
    ),
    signature(
        "name resolution",
        r"Name or service not known|Temporary failure in name resolution|No address associated with hostname|"
        r"nodename nor servname provided|(?:host|name) .{0,80}could not be resolved",
        "could not resolve the name of a host",
        "use a name that every node can resolve, or an address; shoal doctor --hosts checks names",
    ),
    signature(
        "nodes did not meet",
        r"fewer than (?P<count>\d+) nodes joined at (?P<place>\S+)",
        "waited in vain for {count} nodes at {place}",
        f"look at the logs of the missing nodes; {_NETWORK}",
    ),
    signature(
        "nodes differ",
        r"this node's config differs from that of (?P<other>\S+): (?P<difference>.*)",
        "has another config or version than {other}: {difference}",
        "use the same environment and recipe on all nodes",
    ),
    signature(
        "rendezvous lost",
        r"client socket has timed out|client socket has failed to connect|failed to recv, got 0 bytes|recvValue failed|"
        r"sendBytes failed|DistStoreError|the rendezvous at \S+ no longer answers|DistNetworkError",
        "lost the rendezvous, or could not reach it",
        f"look at the first node's log; {_NETWORK}",
        kind="follows",
    ),
    signature(
        "no route",
        r"No route to host|Network is unreachable|Host is unreachable",
        "had no network route to another node",
        _NETWORK,
    ),
    signature(
        "connection refused", r"Connection refused", "could not connect to another process", _NETWORK, kind="follows"
    ),
)

_HOST: Final[tuple[Signature, ...]] = (
    signature(
        "host out of memory",
        r"^(?:\w+\.)*MemoryError\b|DefaultCPUAllocator: (?:can't|not enough) |std::bad_alloc|Cannot allocate memory|"
        r"^(?:shoal: )?out of memory: ",
        "ran out of memory",
        _LESS_MEMORY,
    ),
    signature(
        "quota",
        r"Disk quota exceeded|EDQUOT",
        "exceeded its disk quota",
        "remove files, or set launch.runs to a disk with a larger quota",
        seen=False,
    ),
    signature(
        "disk full",
        r"No space left on device|ENOSPC|has no space",
        "found a disk full",
        "remove files, lower checkpoint.keep, or set launch.runs to another disk",
    ),
    signature(
        "read-only disk",
        r"Read-only file system|EROFS",
        "found a disk read-only",
        f"a disk is often made read-only after an error; {_DISK}",
    ),
    signature(
        "shared disk",
        r"Stale file handle|ESTALE|Transport endpoint is not connected|Remote I/O error|Cannot send after transport endpoint",
        "lost a shared file system",
        _DISK,
        seen=False,
    ),
    signature("io error", r"Input/output error", "had an error of a disk", _DISK, seen=False),
    signature(
        "open files",
        r"Too many open files",
        "opened too many files",
        "raise the limit (ulimit -n); shoal doctor checks it",
    ),
    signature(
        "processes",
        r"can't start new thread|[Ff]ork: (?:retry: )?Resource temporarily unavailable|pthread_create failed",
        "could not start a thread or a process",
        "raise the limit (ulimit -u) or pids.max of the job's cgroup; shoal doctor checks it",
        seen=False,
    ),
    signature(
        "import",
        r"(?P<text>(?:ModuleNotFoundError|ImportError): .*|No module named \S+)",
        "could not import a module: {text}",
        "activate the same environment on every node; shoal setup makes one on the shared disk",
    ),
    signature(
        "library",
        r"error while loading shared libraries: (?P<name>[^:]+)|(?P<file>\S+): cannot open shared object file|"
        r"version `(?P<version>\S+)' not found",
        "lacks a library",
        "load the same modules and containers on every node",
    ),
    signature(
        "program not found",
        r"execve\(\): (?P<file>.*): |: command not found|: \d+: \S+: not found|[Ee]xit(?:ed with exit)? code 127",
        "could not start the program",
        "is the environment activated in the job, and on a disk that this node has?",
    ),
    signature(
        "not permitted",
        r"PermissionError: .*|Permission denied",
        "was not permitted to use a file",
        "check the owner and the mode of that path on this node",
    ),
    signature(
        "missing file",
        r"FileNotFoundError: .*|No such file or directory",
        "did not find a file",
        "is it on a disk that every node has? shoal doctor --shared DIR checks this",
    ),
    signature("interrupted", r"^KeyboardInterrupt", "was interrupted (Ctrl-C)"),
)

# How a process ended. The first group explains itself; the others count only if a log says nothing else.
_SIGNALS: Final[tuple[Signature, ...]] = (
    signature(
        "segmentation fault",
        r"was killed by SIGSEGV|Fatal Python error: Segmentation fault|: Segmentation fault|segfault at",
        "crashed (segmentation fault)",
        "set PYTHONFAULTHANDLER=1 to see where; a library may not fit this machine",
    ),
    signature(
        "bus error",
        r"was killed by SIGBUS|Fatal Python error: Bus error|: Bus error",
        "crashed (bus error): usually /dev/shm is full, or a file was cut while it was mapped",
        "check the size of /dev/shm, and whether another program changes the files",
    ),
    signature(
        "illegal instruction",
        r"was killed by SIGILL|Fatal Python error: Illegal instruction|: Illegal instruction",
        "crashed (illegal instruction): a program was built for another CPU",
        "use nodes of one kind (--constraint), or an environment for each kind",
    ),
    signature("arithmetic", r"was killed by SIGFPE", "crashed (SIGFPE, integer division by zero)"),
    signature(
        "killed",
        r"was killed by SIGKILL|task \d+(?:-\d+)?: Killed",
        "was killed by SIGKILL, which the kernel (out of memory), Slurm or a user sends",
        "dmesg on that node shows whether memory ran out",
    ),
    signature(
        "c++ exception",
        r"terminate called after throwing an instance of '(?P<type>[^']+)'",
        "was ended by a C++ exception ({type})",
    ),
)
ENDS: Final[tuple[Signature, ...]] = (
    signature("lost peer", r"ended with code 3$", "ended because another process was gone", kind="follows"),
    signature("aborted", r"was killed by SIGABRT|: Aborted", "aborted itself (SIGABRT)", kind="end"),
    signature("terminated", r"was killed by SIG(?P<name>[A-Z0-9]+)", "was ended by SIG{name}", kind="end"),
    signature(
        "exit code",
        r"(?:ended with|Exited with exit) code (?!0\b|85\b)(?P<code>\d+)",
        "ended with code {code}",
        kind="end",
    ),
)

TABLE: Final[tuple[Signature, ...]] = (*OUTSIDE, *_NCCL, *_PEERS, *_GPU, *_HOST, *_SIGNALS, *ENDS)

# Of the Python exceptions that no other signature recognizes.
EXCEPTION: Final = signature("python exception", r"(?P<text>.+)", "raised {text}")
REPORTED: Final = signature("shoal's message", r"(?P<text>.+)", "reported: {text}")
SILENT: Final = signature(
    "silent node",
    r".*",
    "went silent: its log ends without an exit, so the node, its network or its launcher died",
    "ask Slurm or the cluster's staff about that node; exclude it (--exclude) if this happens again",
)
HANG: Final = signature("hang", r"(?P<text>.+)", "{text}", "the file of stacks shows where each rank waited")
ABSENT: Final = signature(
    "absent", r".*", "did not join a collective for which the others waited", "shoal doctor tests its node"
)
