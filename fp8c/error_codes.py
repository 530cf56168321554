"""Every diagnostic code with its explanation; `fp8c explain CODE` prints it. Codes are permanent: never reuse one.

E01xx syntax · E02xx conflicts · E03xx matching · E04xx hardware · E05xx data flow · E06xx files and versions ·
E07xx broken invariants · E08xx models · W.... warnings and R.... remarks use the same hundreds.
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
}
