"""The app's settings and the pipeline's carry the same names and defaults."""

from dataclasses import asdict, fields

from ltv.config import Config, ModelsConfig
from ltv.train import ltv_config
from ltv_stack import LTVConfig
from runkit.run import Run


def test_settings_of_models_are_the_pipelines_own_by_name_and_default(tmp_path):
    ours, theirs = asdict(ModelsConfig()), LTVConfig()
    assert set(ours) < {field.name for field in fields(LTVConfig)}
    plain = {name: list(value) if isinstance(value := getattr(theirs, name), tuple) else value for name in ours}
    assert ours == plain
    changed = Config(models=ModelsConfig(model="stack", stacking_bases=["elastic_net"], threads=3))
    made = ltv_config(changed, Run(tmp_path))
    assert (made.model, made.stacking_bases, made.threads) == ("stack", ("elastic_net",), 3)
