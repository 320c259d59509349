"""The packed engine: many adapters train in one forward and backward over one resident base, each as if alone.

**What is computed.** A pass takes the next micro-batch of each of N adapters (`pack`). Their rows are laid end to end in one
stream of T tokens without padding between them (`batches`). Every frozen linear is multiplied once, for all rows; beside it
each adapter's rows get their own update (`lora`):

    y[t] = W x[t] + b + s_k B_k A_k drop_k(x[t])          k the adapter that token t belongs to
    L_k  = (sum of its own cross-entropies) / (terms of its own whole step, known beforehand)
    g_k += dL_k / d(A_k, B_k);   when its step is complete:   g_k clipped by its own norm, AdamW with its own numbers

    shapes   x [T, I]   W [O, I]   A_k [R, I]   B_k [O, R]   h = s A x [T, R]   R the rank bucket: 8, 16, 32, ...
    forward  h = x A^T                 y += h B^T
    backward dB = gy^T h   dh = s gy B   dA = dh^T x   gx = gy W + dh A

The sum over adapters has no mean over the pack and no common clip, so that gradients never mix: tokens of one adapter meet the
others only in products where each row stands for itself.

**Where things are.** `frozen` the products with W (4-bit: one dequantisation for all rows); `bank` the factors of all
adapters of a rank bucket with gradients and moments, rows that join and leave; `plan` which rows meet which factors;
`kernels` grouped products; `attention`, `sequences` attention inside each sequence; `lm_head`, `class_head` losses at the
positions that count, in portions; `dropout` masks from a counter; `optimizer` clip and AdamW over rows; `training` one
adapter's standing; `pack` the pass.

**What is exact, and why.** On CPU in float32 with one thread, an adapter's bits are a function of its job alone: not of who
shares its passes, of when its micro-batches run, of joining and leaving, or of a stop and resume. Everything that could
change a bit is one of these, and each is bound to the job:

- *Products with W.* Rows of a matrix product keep their bits whoever stands beside them if the number of rows is a multiple
  of 32 (`batches.TILE`): none of 2,550 cases differed, forward and backward, widths 50 to 4,864, 32 to 4,128 rows, at any
  offset (torch 2.13, MKL, AVX-512, one thread); with fewer than 16 rows most do. So the stream is filled up to a tile by
  tokens of nobody.
- *Products with A and B.* The grouped kernel computes each group in its own shape: tokens of the job's micro-batch, R, I or
  O. The rank bucket follows from the rank. Sums over tokens (dA, dB) are over one micro-batch, in one kernel call.
- *Attention.* Sequences are computed in buckets of equal padded length, which is a function of the sequence.
- *Elementwise functions.* A vectorised loop and its scalar rest may round differently; with the tile, and with blocks of
  ALIGNED values in the banks, there is no rest whose place depends on neighbours.
- *Sums.* Losses are added from first to last by owner. A gradient's norm is summed over blocks of 64 values and these, from
  first to last, in float64: blocks of layers that only others have are zero and change nothing. Updates of one input are
  added in the order of layers.
- *Micro-batches* are a function of seed, rows and batch size. Only a split for want of memory leaves the promise; it is
  recorded.
- *Random numbers* are functions of (seed, step, row, position, layer, feature); nothing is drawn.

bfloat16 bases keep the arithmetic but not this promise: their kernels are not row-invariant (measured). Against plain PEFT and
`torch.optim.AdamW` the engine agrees in float64 within 1e-10 after 20 steps.

**Where the ideas are from.** LoRA: arXiv:2106.09685; rsLoRA: arXiv:2312.03732; LoRA+: arXiv:2402.12354; QLoRA:
arXiv:2305.14314. Rows of many adapters over one base product: Punica (arXiv:2310.18547) and S-LoRA (arXiv:2311.03285) for
serving; mLoRA (arXiv:2312.02515) and LoRAFusion (arXiv:2510.00206) for training. Streams without padding: FlashAttention's
variable-length form (arXiv:2205.14135). Losses in portions at the head: Cut Cross-Entropy (arXiv:2411.09009) and Liger
Kernel (arXiv:2410.10989). The counter-based mask follows the idea of Salmon et al., "Parallel random numbers: as easy as 1,
2, 3" (SC 2011). Choice of a pass: deficit round-robin, Shreedhar and Varghese (SIGCOMM 1995).
"""
