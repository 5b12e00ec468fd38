"""Write and read models by huggingface_hub's mixin: config.json, model.safetensors and a model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import load_file

from sparsecnx.models.pretrained import Pretrained, build

REPOSITORY = "https://github.com/sparsecnx/sparsecnx"
CARD = """---
{{ card_data }}
---

# {{ name }}

A `{{ kind }}` of [sparsecnx]({{ repo_url }}), which pretrains ConvNets on the visible pixels of masked images.
The method is described in <{{ paper }}>.

```python
import sparsecnx  # pip install 'sparsecnx[hub]'

model = sparsecnx.models.{{ kind }}.from_pretrained("{{ name }}")
```

`config.json` holds the arguments of the constructor. The training data, the licence and the intended use are for the
author of this model to add.
"""


class HubModel(PyTorchModelHubMixin, model_card_template=CARD, repo_url=REPOSITORY, library_name="sparsecnx"):
    """A model on its way to a folder or the hub, or back. The mixin writes the weights of `module`."""

    def __init__(self, module: Pretrained) -> None:
        self.module: Any = module

    def save(self, folder: str | Path) -> None:
        """Write the model to a folder."""
        name = Path(folder).absolute().name
        self.save_pretrained(folder, config=self.module.config(), model_card_kwargs=self._card(name))

    def push(self, name: str, **options: Any) -> str:
        """Upload the model and return the address of the commit."""
        return self.push_to_hub(name, config=self.module.config(), model_card_kwargs=self._card(name), **options)

    def _card(self, name: str) -> dict[str, Any]:
        return {"name": name, "kind": type(self.module).__name__, "paper": self.module.paper}

    @classmethod
    def load(cls, name: str | Path, kind: type[Pretrained], **options: Any) -> Any:
        """Return the model of this class in a folder or on the hub, see `Pretrained.from_pretrained`."""
        if not Path(name).is_dir():
            try:
                validate_repo_id(str(name))
            except HFValidationError:
                problem = "there is no such folder, and the hub has names such as 'user/model'"
                raise FileNotFoundError(f"name is {str(name)!r}: {problem}") from None
        try:
            return cls.from_pretrained(name, kind=kind, **options).module
        except AttributeError as error:  # of the mixin, which takes the JSON for an object
            raise ValueError(f"name is {str(name)!r}: {CONFIG_NAME} holds no object ({error})") from error
        except (TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"name is {str(name)!r}: {error}") from error

    @classmethod
    def _from_pretrained(  # type: ignore[override]
        cls,
        *,
        model_id: str,
        kind: type[Pretrained],
        config: Mapping[str, Any] | None = None,
        device: str | torch.device = "cpu",
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **arguments: Any,
    ) -> HubModel:
        """Return the model whose config the mixin has read; None if there was no config."""
        folder = Path(model_id)
        if config is None:
            there = "the folder" if folder.is_dir() else "there is no such folder, and the hub"
            raise FileNotFoundError(f"name is {model_id!r}: {there} has no {CONFIG_NAME}, which save_pretrained writes")
        module = build({**config, **arguments}, kind)
        if not isinstance(module, kind):
            raise ValueError(f"it holds a {type(module).__name__}, expected a {kind.__name__}")
        options: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token}
        options |= {"force_download": force_download, "local_files_only": local_files_only}
        local = folder / SAFETENSORS_SINGLE_FILE
        weights = local if folder.is_dir() else hf_hub_download(model_id, SAFETENSORS_SINGLE_FILE, **options)
        # The dtype is that of the file. Every tensor of the model is in the file, or this raises.
        module.load_state_dict(load_file(weights, device=str(device)), strict=True, assign=True)
        return cls(module.eval())
