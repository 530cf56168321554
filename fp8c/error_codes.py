"""Every diagnostic code with its explanation; `fp8c explain CODE` prints it. Codes are permanent: never reuse one.

E01xx syntax · E02xx conflicts · E03xx matching · E04xx hardware · E05xx data flow · E06xx files and versions ·
E07xx broken invariants · E08xx models · E09xx schedules and clusters · W.... warnings and R.... remarks use the same hundreds.
"""

from __future__ import annotations

EXPLANATIONS: dict[str, str] = {
    "E0101": "A word or mark stands where the language has none, or one is missing. The caret is at the place, and the "
    "help names the nearest word that may stand there. docs/spec_language.md has the whole grammar.",
    "E0102": "A string or a regular expression is not closed on the line where it begins. Strings cannot span lines.",
    "E0103": "The file is not plain UTF-8 text: it holds a NUL, another control character, or bytes that are no UTF-8.",
    "E0104": "A limit that keeps a hostile file from hurting: 1 MiB of text, brackets 100 deep, integers of 9 digits, sets "
    "that use sets 64 deep.",
    "E0106": "A path pattern or regular expression cannot be read. In a pattern `*` is one dotted segment, `**` any number "
    "of them, `{a,b}` a choice and `[3..60]` a range of numbers; anything else stands for itself.",
    "E0201": "The same name is defined twice: two rules, formats, sets or aliases of one file, or one field twice in one "
    "rule. Which of the two was meant cannot be known.",
    "E0202": "A format, a set or the alias of a used file is not defined. Names of a used file are written `alias.name`.",
    "E0203": "Two rules give the same field of the same use different values. Rules of a spec commute, so neither wins by "
    "its place. Narrow one of them, or write `override` before the one that should win. A spec that extends "
    "another needs `override` as well to change what its parent decided.",
    "E0204": "A rule marked `final` decided this value, and a later `override` changes it.",
    "E0205": "A file uses itself, or a format or set is defined by itself, perhaps through others.",
    "E0206": "A file holds at most one spec, and a file that is compiled or extended holds exactly one. Formats and sets "
    "are shared by `use`.",
    "E0207": "A rule decides nothing: it has no `precision`, no fprop, dgrad or wgrad, no `cache` and no `recompute`.",
    "E0301": "Each part of a rule's selector matches something in this model, but all of them together match nothing, so "
    "the rule would be ignored without a word. Write `optional rule` where that is meant.",
    "E0302": "One alternative of a selector (a value in `kind(...)`, a branch of `|`, one of `{a,b}`, a range of layers) "
    "matches nothing in this model: a misspelling, or a model whose parts have other names. The nearest real "
    "names are given. A `?` after the alternative allows it to match nothing.",
    "E0303": "A GEMM has no format: no rule decides it, or only some of its operands. Nothing stays BF16 by accident; say "
    "`precision = bf16;` for it, or `defaults { undecided_gemm = bf16; }` for all such.",
    "E0304": "An `expect` of the spec does not hold on this model.",
    "E0305": "A rule gives a field to a use that has no such field: fprop, dgrad and wgrad belong to GEMMs, `cache gate` "
    "to SwiGLU.",
    "E0306": "A `shape(...)` asks for a size that is known only when the model runs, such as the number of tokens `m`.",
    "E0307": "A pattern took more than 50 ms on one name. Repetitions inside repetitions are what makes a pattern slow.",
    "E0401": "The target's GEMMs cannot read groups of this shape. Write one that the help names.",
    "E0402": "A size is not a multiple of its group, or does not meet the spec's `target ... requires`. `pad { "
    "partial_group = pad; }` gives the last, shorter group a scale of its own; `partial_group = keep;` leaves "
    "such a GEMM in BF16 with a remark.",
    "E0403": "The target cannot read scales of this kind.",
    "E0404": "The element does not fit the place: E5M6 is a cache format that no tensor core reads; moments, master "
    "weights and GEMM outputs are kept without scales.",
    "E0405": "The promotion interval does not fit: it must be a multiple of the target's MMA instruction along K and "
    "divide the group, because scales change at group borders.",
    "E0406": "No target has this name. Targets are machines (`h200`), not architectures; a path to a .toml file names one "
    "of your own.",
    "E0407": "The spec's `target` statement does not name the architecture of the machine asked for. The CPU reference "
    "stands in for any.",
    "E0408": "The .toml file is not a target record: a field is missing, unknown or of the wrong type.",
    "E0420": "An fp8c operator ran on a device for which nothing implements it. Kernels are registered when their "
    "backend is imported: fp8c.backends.reference for the CPU, fp8c.ops.decompositions for plain tensor operations on any "
    "device.",
    "E0421": "The format cannot be produced by fp8c::quantize: it is not a quantized format, or it asks for stochastic "
    "rounding, which no kernel implements, or for delayed scales where there are none: they are for GEMM operands with one "
    "scale for a tensor.",
    "E0422": "The state of delayed scales that was loaded does not hold a history and a scale for each site: it is not what "
    "`session_of(step).scales.state_dict()` gave.",
    "E0423": "The tensor-core model promotes after whole instructions of 32 elements of K; the promotion interval, or a group "
    "size along K, is no multiple of 32.",
    "E0501": "`retile ... exact` promises that changing the tiles adds no rounding. That needs power-of-two scales (pow2 "
    "or e8m0): the ratio of two FP32 scales is no power of two, so values would be rounded again.",
    "E0505": "One operand of a GEMM is FP8 and the other is not. No tensor core multiplies such a pair; it would have to "
    "be converted back silently.",
    "E0506": "Backward keeps an input in tiles of one shape and wgrad reads another. Changing tiles is one more rounding, "
    "so it is written out: `cache x as act retile [128x1];`.",
    "E0507": "A dispatched payload is read by a GEMM in another FP8 format, so it would be quantized twice. Give the "
    "operand the payload's format.",
    "E0508": "A scale must not change inside the sum that a GEMM computes, except at group borders both operands share. "
    "Groups run along k (columns of x and w) for fprop, n (columns of dy, rows of w) for dgrad, tokens (rows of x "
    "and dy) for wgrad.",
    "E0430": "The CUDA kernels are compiled on first use, and neither NVRTC (packages cuda-bindings and nvidia-cuda-nvrtc, "
    "which torch's CUDA builds bring) nor nvcc was found, and the kernel cache does not hold this kernel. GEMMs run in "
    "their portable form, slowly.",
    "E0431": "The CUDA compiler rejected a kernel of fp8c. This is a bug in fp8c, or a compiler older than CUDA 12.8: "
    "please report the message.",
    "E0433": "`--kernels` compiles the step's kernels ahead of time. That takes a target that is a GPU (h100, h200, "
    "h800, b200) and the triton package; it takes no GPU.",
    "E0434": "The environment variable FP8C_GEMM chooses among the implementations of the GEMMs: `default` (fp8c's own), `measure` "
    "(the fastest, measured once for each class of shapes), or the name of one, to pin it.",
    "R0436": "The file that remembers which implementation of a GEMM was the fastest could not be read or written, was damaged, or "
    "belongs to another machine or version. It is never trusted then: choices are measured again.",
    "R0437": "While the implementations of a GEMM were measured, memory ran out, or one of them gave another result than fp8c's "
    "own. The one at fault is not taken.",
    "R0438": "A file of the kernel cache was damaged or could not be read or written, or kernels of a build do not fit this "
    "machine's compiler. Kernels are compiled again where they are needed; what was found is never run.",
    "E0432": "A call of the CUDA driver failed while a kernel was loaded or started. A message about the driver's version "
    "asks for a newer driver; an illegal address or instruction points at a bug in fp8c or at memory freed too early.",
    "R0430": "A GEMM is served by another implementation than the one meant for it (Triton, or the portable form without tensor "
    "cores), or an operand is copied before it, for the reason given. It takes longer. Said once for each reason.",
    "E0520": "An fp8c operator got operands that do not fit it: rank, dtype, sizes, or scales of another group shape.",
    "E0521": "Expert offsets were given where groups cannot restart at each expert. Only groups of several rows (such as "
    "128x1) of a 2-D tensor cross expert boundaries; 1x128 groups need no offsets.",
    "E0522": "fp8c::attention computes no gradient for an additive mask, and the model asks for one (a learned bias).",
    "E0750": "A schedule does not hold every task of its problem exactly once.",
    "E0751": "A schedule starts a task before one of its inputs has ended.",
    "E0752": "A schedule runs two tasks on one stream at the same time.",
    "E0753": "A schedule holds more memory at some time than its budget allows.",
    "E0754": "A schedule is shorter than the lower bound it claims; either the bound or the times are wrong.",
    "E0755": "Ranks would wait for each other for ever: a collective, or a pipeline action, is next on one rank's "
    "stream while a member of its group waits in another one first.",
    "E0756": "schedule-overlap may only reorder nodes, and each node must stay behind everything it reads "
    "(invariant order-only).",
    "E0757": "Ranks found different orders for their collectives, so they would exchange the wrong data or wait "
    "for ever. Their graphs or their durations differ; durations that were measured must be shared before "
    "scheduling.",
    "E0601": "`use` reads files below the folder of the spec that was asked for, and `std:` ones. Links that lead outside "
    "do not count as inside.",
    "E0602": "A spec begins with `version 1;`, the version of the language it is written in.",
    "E0603": "A spec file cannot be read, or no shipped spec has the name. `fp8c spec list` names those that come with "
    "fp8c.",
    "E0604": "Files use each other more than 16 deep.",
    "E0605": "`fp8c spec import` cannot write this as a spec: the source is unknown, or asks for what no spec can say, such as "
    "FP4 or scales fixed ahead of time. Nothing is left out silently.",
    "E0610": "The build, or a file asked for, cannot be written there: no permission, no space, or a file stands where a "
    "folder is needed. A file that may not be read, or whose name is too long for the file system, is refused as well. Nothing half-written is left, and a build that was there is still there.",
    "E0611": "The output folder holds files that fp8c did not write, and a build replaces its folder whole. Choose another "
    "folder, or pass --force to lose what is there.",
    "E0612": "The folder is not a build, was written by a version with another format, or a file in it was changed after "
    "the build. The manifest holds the hash of every file.",
    "E0613": "The model is not the one the build was made from: parameters, the captured graph or the rewritten graphs "
    "differ. A build runs only what it describes.",
    "E0614": "The spec is not the one the build was made from, or it now decides something else.",
    "E0701": "No pass has this name. `fp8c passes` lists them in the order they run.",
    "E0615": "`fp8c explain` or a page of `fp8c inspect` was asked for something the build does not have. Uses are named by "
    "module path, with `:op` for what is no GEMM; the help names what is spelt most like it.",
    "E0801": "The model file, folder or module does not exist. fp8c reads models from this machine only and never "
    "downloads one. Name a .py file, an importable module with `:factory`, or `hf:` with a config.json, a folder or a "
    "model type.",
    "E0802": "The model file has no function `model()` (or no function of the name after the colon). It must return "
    "the torch.nn.Module to train; the message lists the functions and classes that the file does have.",
    "E0803": "Code of the model raised an exception: while its file was imported, in `model()`, in "
    "`example_inputs()`, or in the forward pass. The place is the innermost line that belongs to the model.",
    "E0804": "The model file has no function `example_inputs()`. It must return one batch: a dict of keyword arguments "
    "for the forward, or a tuple of positional ones. The compiler captures the step with it.",
    "E0805": "The training step has no scalar loss. Either the model returns it (a scalar tensor, or outputs with "
    "`.loss` or `['loss']`), or the model file defines `loss(outputs, batch)`.",
    "E0806": "An `hf:` reference needs the transformers package, which is not installed.",
    "E0807": "transformers has no model of this type, or no causal language model of it. The help names the nearest.",
    "E0808": "The model's code tried to end the process (sys.exit, SystemExit, os._exit, os.abort). Importing a model "
    "file must not run a program: put command-line code under `if __name__ == '__main__':`.",
    "E0809": "An override names an argument that the factory does not take or a field that the configuration does not "
    "have. Nothing is ignored silently, because a misspelt override would compile another model.",
    "E0810": "The model reference has none of the known forms: model.py, model.py:factory, package.module:factory, "
    "hf:config.json, hf:folder, hf:MODEL_TYPE. Or its file's path is no UTF-8 text.",
    "E0811": "The factory did not return a torch.nn.Module (or a pair of a module and its example inputs).",
    "E0812": "The example inputs hold no tensor, so there is nothing to capture the step with.",
    "E0813": "The Hugging Face configuration is not valid: no JSON object, or one without `model_type`.",
    "E0814": "The configuration asks for code from its repository (`auto_map`), and transformers has no class of that "
    "type. fp8c never runs such code; import it in a model.py of your own instead.",
    "E0816": "A tensor of the batch has no elements, so there is no step to capture.",
    "E0840": "--verify runs the training step, which needs weights. Models too large for this machine are planned without.",
    "E0845": "`fp8c numerics --inject` breaks one operand on purpose, to see that it is found. The fault is "
    "KIND:MODULE[:GEMM.OPERAND] with the kind scale, axis or e5m2, and must hit an operand that the spec quantizes.",
    "E0846": "`fp8c numerics --search` found no choice of formats within the error budget, not even BF16 for every GEMM.",
    "E0847": "`fp8c numerics` compares a spec with BF16, and the spec keeps everything of this model in BF16.",
    "R0402": "A GEMM stays BF16 because a size is not a multiple of its group, as `pad { partial_group = keep; }` asks.",
    "R0411": "A size is no multiple of its group, and the spec pads: the last group is shorter and has a scale of its own. "
    "MLA's 576-wide projection is such a case.",
    "W0301": "As E0301, in a spec that says `defaults { unmatched_rule = warn; }`.",
    "W0302": "As E0302, in a spec that says `defaults { unmatched_rule = warn; }`.",
    "W0303": "As E0303, in a spec that says `defaults { undecided_gemm = warn; }`: these GEMMs stay BF16.",
    "W0410": "FP8 partial sums are not promoted on a target whose tensor core cuts them off. On Hopper about 14 bits are "
    "kept: at K = 4096 the largest relative error is nearly 2 % (DeepSeek-V3, arXiv:2412.19437, 3.3.2).",
    "W0422": "No C compiler worked, so the exact model of the tensor core's accumulator runs in PyTorch: the same bits, several "
    "times slower. Install a C compiler or name one in the environment variable CC.",
    "E0901": "A task, or an operator of a table of durations, waits for one that the table does not have: an "
    "operator is missing, or `after` is misspelt.",
    "E0902": "Tasks wait for each other in a circle, so none of them can ever start. The message gives the circle "
    "in the order work would have to flow.",
    "E0903": "Two tasks have the same name; names are how tasks refer to each other.",
    "E0904": "A duration is negative, infinite or no number.",
    "E0905": "No schedule keeps the memory of the graph or of the two chunks within the budget. For small problems "
    "this is proven; for large ones no search found one. The message gives the least a schedule was found "
    "to need.",
    "E0910": "The file is no table of durations: it cannot be read, is no TOML or JSON, or its schema is not "
    "`fp8c.durations/1`.",
    "E0911": "A table of durations has a field that is missing, unknown, of the wrong type, or no number that it can be.",
    "E0912": "A table of durations misses operators: a kind of layer that the model has, one of its phases F, B "
    "and W, the operator marked `output`, or dispatch and combine of layers whose experts are spread over "
    "GPUs.",
    "E0920": "The model has fewer layers than the pipeline has stages. Schedules with two stages per rank need "
    "twice as many.",
    "E0921": "The mesh does not divide the experts: every GPU of an expert-parallel group holds the same number.",
    "E0922": "A token cannot be sent to as many experts as top-k asks for on as many nodes as it may reach.",
    "E0923": "A communication channel needs at least one warp for each of its roles (send, forward, receive).",
    "E0924": "The load per expert is no list of numbers, 0 or more and not all 0, one for each expert.",
    "E0930": "There is no cost sheet of this name. Cost sheets say how fast kernels get on a machine; a path to a "
    "`.toml` file works too.",
    "E0931": "The file is no cost sheet: it cannot be read, has another schema, is based on itself, or is a what- "
    "if without `base` and `wish`.",
    "E0932": "A cost sheet has a field that is unknown, missing, negative or of the wrong type.",
    "E0940": "There is no pipeline schedule of this name.",
    "E0941": "An interleaved pipeline takes micro-batches in equal rounds.",
    "E0942": "DualPipe and DualPipeV need at least two micro-batches per stage in flight, and DualPipe an even "
    "number of both ranks and micro-batches.",
    "E0943": "The GPUs cannot be divided into pipeline ranks of whole expert-parallel groups.",
    "E0944": "The sequences of a step cannot be dealt evenly to the data-parallel ranks and micro-batches.",
    "E0945": "Activations of the micro-batches in flight exceed the memory budget on some rank, whatever the order "
    "inside a chunk.",
    "E0950": "A choice among settings was asked for without any setting.",
    "E0951": "Communication needs at least one SM, and so does compute.",
    "E0960": "`simulate` needs exactly one source of durations: a build that holds `durations.json`, or "
    "`--durations FILE`.",
    "E0963": "`fp8c export --format perfetto` draws a build's schedule, or else its estimated durations. A build has the one "
    "when its step has collectives, and the other when its target has a cost sheet.",
    "E0961": "The file is no Chrome trace of GPU kernels, or the trace has no kernel that could be read.",
    "W0507": "A GEMM in BF16 reads a payload that was dispatched in FP8, so it sees a rounded copy.",
    "W0509": "wgrad is asked to read BF16, but what backward keeps of its input is FP8, by another rule. Write `cache x "
    "off;` beside it.",
    "E0820": "A loop over experts selects tokens by the data, so no graph can hold it, and fp8c can't rewrite it to "
    "grouped GEMMs: it holds a construct whose meaning for all experts at once isn't known, or experts that differ. "
    "The usual loop is `for i, expert in enumerate(self.experts): token, slot = torch.where(indices == i); "
    "y[token] += expert(x[token]) * weights[token, slot, None]`. `fp8c.compile(model, fullgraph=False)` leaves any other "
    "as it is.",
    "E0821": "A loop over experts was rewritten to grouped GEMMs, and its outputs or gradients then differed from the "
    "loop's on the example inputs. Nothing was changed. Either the routing decision holds entries that are no expert's "
    "index (dropped tokens), or this is a bug in fp8c: please report the loop.",
    "R0820": "A loop over experts runs as grouped GEMMs: tokens are sorted by expert once, each Linear of the experts is "
    "one grouped GEMM over their stacked weights, and results are summed per token. Parameters and state_dict stay as "
    "they are. The note says how the result was compared with the loop's.",
    "R0823": "A loop over experts can't become grouped GEMMs (see E0820) and stays as it is written, because the model was "
    "compiled with `fullgraph=False`. Its shapes depend on data, so it runs in pieces, each a graph of its own.",
    "R0822": "Experts of a transformers model use fp8c's implementation: the same grouped GEMMs as transformers' own "
    "'grouped_mm', which also stay grouped GEMMs with FP32 parameters under autocast.",
    "R0840": "Attention masks that hold the causal triangle, proven from the operators that make them, were dropped for the "
    "causal kernel. The result is the same; `without=('causal-attention',)` keeps the masks.",
    "R0841": "An attention mask is kept: it depends on data (padding, packed sequences), is a window, or is made by operators "
    "that fp8c does not follow.",
    "R0842": "FP8 weights are normally kept between calls and quantized again only when a parameter's value has changed. Here "
    "that can't be told, so every forward and backward quantizes them.",
    "W0843": "A step compiled with `main_grad=True` leaves every parameter's `grad` empty. This optimizer reads `grad`, so it "
    "would leave the parameters as they are, without an error.",
    "E0843": "FP32 accumulators (`main_grad`) belong to whole parameters: one of the same shape, in FP32. An expert that "
    "a mesh shards over `ep` has a DTensor of them; any other sharded parameter (FSDP2) has its gradient reduced by FSDP2 instead.",
    "R0844": "The output head is joined with the cross-entropy loss behind it: logits are made once, their gradient takes "
    "their place in forward, and backward keeps the head's two gradients instead of logits. `without=('fuse-head-loss',)` "
    "keeps the model's own operators.",
    "R0845": "The output head keeps the model's own operators, because its logits are read by something besides a plain "
    "cross-entropy in FP32, or because the spec puts it in FP8. Logits that the compiled call returns are read: "
    "`fp8c.compile(model, outputs=('loss',))` returns the loss alone.",
    "R0848": "A batched matrix product (torch.bmm, einsum) has a weight as an operand, as experts have that all see every token "
    "slot. fp8c quantizes Linears and grouped GEMMs; this product stays in BF16 whatever the spec says of experts. Written "
    "as grouped GEMMs (torch.nn.functional.grouped_mm), or as a loop over experts, it runs in FP8.",
    "W0847": "Saved bytes are counted with sizes that nobody knows before the step: a number read on the host, such as the "
    "rows of each expert behind `counts.tolist()`. Each such size counts as 4,096, so the sum may be far off. What is "
    "computed is not touched. Loops over experts that fp8c lifts to grouped GEMMs have known sizes.",
    "E0502": "Backward needs a value that the spec says to recompute, and nothing it could be computed from may be kept: "
    "every value in front of it is recomputed as well, or must not be computed twice.",
    "E0702": "A pass was run before the one that makes what it needs. Passes are never sorted: their order is written in "
    "passes/__init__.py, and on the command line it is the order given.",
    "E0703": "A GEMM of the rewritten graph is not in the precision the plan decided. A pass skipped it or touched one it "
    "should not have; this is a bug in a pass.",
    "E0704": "A pass reported a number of rewrites that does not fit the graph: it changed something and said 0, or "
    "changed nothing and said more. This is a bug in the pass.",
    "E0705": "The graph breaks an invariant after a pass. The diagnostics below it say which, with the nodes around it. "
    "This is a bug in the pass; print its input with --print-ir-before=PASS.",
    "E0706": "A quantized value and its scale were separated: a consumer reads the scale of another value, or one that did"
    " not take the same way (transposed, gathered, sent) as its data.",
    "E0707": "An operator states another format than the value it reads was quantized in.",
    "E0708": "The groups of a GEMM operand run across the axis it sums over, so its scales cannot be applied to partial "
    "sums. wgrad needs 128x1 groups along tokens.",
    "E0709": "An operator other than a scaled GEMM, a conversion or data movement reads FP8 data. FP8 is a storage format:"
    " no arithmetic is done in it.",
    "E0710": "The type an fp8c operator's operands give differs from the type noted for its result.",
    "E0711": "A forward GEMM lost its dgrad or wgrad, or has one too many.",
    "E0712": "A value crosses from forward to backward that choose-saved did not list.",
    "E0830": "The captured backward does not hold exactly one dgrad and one wgrad for a forward GEMM that should have "
    "them. A custom autograd.Function around a GEMM can do that.",
    "E0831": "The plan quantizes a GEMM whose operands are FP64 or whole numbers.",
    "E0832": "The step was captured without a backward: nothing it returns needs a gradient.",
    "E0833": "The step cannot be captured as one graph: Python code depends on the data. The place is the model's line.",
    "E0860": "The mesh given to fp8c.compile has no dimension named `ep`, or some of its ranks would own no "
    "expert: experts are dealt in equal chunks, as DTensor shards an axis.",
    "E0861": "The experts of this loop are found neither in a list of modules or parameters of the module nor in a tensor "
    "whose first axis counts experts, so they can't be sharded.",
    "E0862": "The mesh asked for and the ranks that run differ in number, or a machine was given more ranks than it has "
    "GPUs. torchrun starts one process for each rank.",
    "E0863": "Ranks were started with different specs, targets, versions or models, or one of them never came. Compared "
    "before anything is exchanged, because ranks with different graphs would send each other the wrong data or wait for "
    "ever.",
    "E0864": "Dense parameters are replicated over the ranks that share experts, and each rank's backward fills their "
    "gradients from its own batch. They must be summed before an optimizer uses them.",
    "E0868": "The gradients of experts that a mesh shards are sums over the ranks, which reduce_gradients divides by their "
    "number. A backward behind that adds another sum, which nothing can tell from the mean any more.",
    "E0865": "A collective of the step failed because another rank is gone or late. The rank that failed first has the "
    "reason in its own output.",
    "E0866": "`--mesh` takes names with sizes, such as ep=64,pp=16, and plans the step of one rank of them. What runs the step "
    "cannot be combined with it, and loading the build takes ranks that form the same mesh.",
    "E0852": "torch.compile keeps one graph for all modules of one class, so under `backend='fp8c'` their delayed scales would "
    "share their histories: one module's values would be scaled by another's magnitudes.",
    "E0867": "DistributedDataParallel wraps what fp8c.compile returned, not the other way round, and it sums `grad`: with "
    "`main_grad` a parameter's gradient never comes there, and the ranks would drift apart. AdamW(zero1=mesh) sums either.",
    "R0860": "Experts were sharded over the ranks of the mesh. all_to_all_single needs the number of rows to send on the "
    "host, which is read once for each routing decision.",
    "E0850": "torch.compile(..., backend='fp8c', options=...) got an option that the backend does not have, or a value of "
    "another type. Options are spec, target, lowering, without and tune.",
    "E1101": "A setting of AdamW is out of range, or a saved optimizer used one that fp8c's AdamW does not have.",
    "E1102": "The optimizer got no parameter that requires a gradient.",
    "E1103": "A parameter or its gradient is sparse, complex or of another type than FP32, BF16 or FP16.",
    "E1104": "The saved optimizer state belongs to other parameters: their number or their shapes differ.",
    "E1110": "The fused AdamW kernel got tensors that do not lie in memory as their parameter does.",
    "E1120": "A setting of the moving average is out of range, or the module has no trained parameter.",
    "E1121": "The saved moving average belongs to another module: names or shapes differ.",
    "E1130": "A checkpoint cannot be written there.",
    "E1131": "There is no whole checkpoint: its record or a file of it is missing, was cut, or is of another version.",
    "E1132": "The checkpoint was trained under another spec, or the spec's text has changed since.",
    "E1133": "The checkpoint has other tensors than the model, the optimizer or the moving average it is loaded into.",
    "E1134": "Something given to be saved beside the model has a state that is neither plain values nor tensors.",
    "E1140": "`fp8c export --format hf` writes the weights of a transformers class, and the model is none (or the folder to "
    "read has no config.json).",
    "E1141": "The checkpoint's tensors are not those of the model that was named: some are missing, unknown or of another "
    "shape.",
    "E1142": "The Hugging Face FP8 format holds E4M3 weights in 128x128 blocks; the plan has others.",
    "E1150": "A schedule of precision is out of range, or a pattern to switch to BF16 matches no GEMM of the step.",
    "E1151": "Telemetry needs an interval of at least one step.",
    "R1143": "Weights with a side that is no multiple of 128 were left in BF16. Programs that derive the size of a block "
    "from the number of scales, as transformers does on a CPU, would read them wrongly.",
    "W1131": "A checkpoint of another number of ranks was loaded: values are the same, sums over ranks are not. Schedulers "
    "and generators that were the same on all ranks go on; what each rank had its own of begins anew.",
    "W1132": "The checkpoint has moments, masters or averages of parameters that are frozen in this run; they were left.",
    "W1101": "AdamW was built on bare parameters or on a module that fp8c did not compile, so no spec says in which "
    "precision to keep moments and masters; it takes the recipe's. Bare parameters also have no names for checkpoints.",
    "W1102": "The spec asks for FP32 gradients, and the optimizer found BF16 ones: each micro-batch's sum is rounded to 8 "
    "significant bits. `main_grad=True` keeps FP32 accumulators.",
    "W1103": "A BF16 moment with this beta never decays: a step takes off less than half a unit in its last place, which "
    "rounding to nearest gives back.",
    "E0870": "A pipeline stage cannot be cut into forward, input gradient and weight gradient: its module writes to what it "
    "is given, or returns nothing that a gradient could come back through.",
}
