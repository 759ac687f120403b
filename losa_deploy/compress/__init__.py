"""LoSA: importance, rates, masks, phases and adapters, one block at a time."""

from losa_deploy.stage_module import call_as_stage

call_as_stage(__name__)
