"""Every diagnostic code with its explanation; `fp8c explain CODE` prints it. Codes are permanent: never reuse one.

E01xx syntax · E02xx conflicts · E03xx matching · E04xx hardware · E05xx data flow · E06xx files and versions ·
E07xx broken invariants · E08xx models · E09xx schedules and clusters · W.... warnings and R.... remarks use the same hundreds.
"""

from __future__ import annotations

EXPLANATIONS: dict[str, str] = {
    "E0420": "An fp8c operator ran on a device for which nothing implements it. Kernels are registered when their "
    "backend is imported: fp8c.backends.reference for the CPU, fp8c.decompositions for plain tensor operations on any "
    "device.",
    "E0421": "The format cannot be produced by fp8c::quantize: it is not a quantized format, or it asks for stochastic "
    "rounding or delayed scales, which no kernel implements.",
    "E0423": "The tensor-core model promotes after whole instructions of 32 elements of K; the promotion interval, or a group "
    "size along K, is no multiple of 32.",
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
    "hf:config.json, hf:folder, hf:MODEL_TYPE.",
    "E0811": "The factory did not return a torch.nn.Module (or a pair of a module and its example inputs).",
    "E0812": "The example inputs hold no tensor, so there is nothing to capture the step with.",
    "E0813": "The Hugging Face configuration is not valid: no JSON object, or one without `model_type`.",
    "E0814": "The configuration asks for code from its repository (`auto_map`), and transformers has no class of that "
    "type. fp8c never runs such code; import it in a model.py of your own instead.",
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
    "E0911": "A table of durations has a field that is missing, unknown, or of the wrong type.",
    "E0912": "A table of durations misses operators: a kind of layer that the model has, one of its phases F, B "
    "and W, the operator marked `output`, or dispatch and combine of layers whose experts are spread over "
    "GPUs.",
    "E0920": "The model has fewer layers than the pipeline has stages. Schedules with two stages per rank need "
    "twice as many.",
    "E0921": "The mesh does not divide the experts: every GPU of an expert-parallel group holds the same number.",
    "E0922": "A token cannot be sent to as many experts as top-k asks for on as many nodes as it may reach.",
    "E0923": "A communication channel needs at least one warp for each of its roles (send, forward, receive).",
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
    "E0961": "The file is no Chrome trace of GPU kernels, or the trace has no kernel that could be read.",
}
