"""An H200 that is not there: torch compiles and runs a training step for it on a CPU, and every launch is counted.

`libraries` stands in for CUDA's two libraries, so that torch's own C++ sees one device. Tensors are fake: they have
shapes and no memory. Dynamo, AOTAutograd and Inductor run as on the GPU (`inductor`), Inductor's output code is
executed, and the launchers of `prx_kernels` run up to their launches (`launchers`). `recorder` notes each launch with
its bytes and operations and what memory is alive, `costs` says what that would take, `builds` compiles every kernel for
sm_90.

What it leaves out, in this order of weight:
- milliseconds are predicted from stated efficiencies, never measured;
- bytes are those of the least traffic: each sector once a kernel and argument. What the L2 saves or loses is not seen;
- kernels inside of cuBLAS, cuDNN and NCCL are one launch each, and collectives carry bytes but no time;
- products of odd sizes are not padded: Inductor times both ways on a real GPU and takes the quicker;
- copies between host and device are noted, and cost nothing; captions come as the text cache leaves them on the device;
- weights of teachers are random, and the picture is what it is: no number is ever computed;
- it hangs on private names of torch. `inductor.py` and `recorder.py` hold them all; checked with torch 2.11 and 2.15.
"""
