"""What MLflow loads for a registered version: code only, the weights come from DVC (a models-from-code file)."""

from typing import Any

import mlflow
import pandas as pd

from modelweld.registry.prediction import Predictor


class PointerModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """A pyfunc that holds an address instead of weights."""

    def load_context(self, context: Any) -> None:
        """Materialise the weights, checked against the registered digests."""
        self.predictor = Predictor.from_config(context.model_config)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """A frame of one prediction for every row; `params={"task": …}` names the head."""
        return self.predictor.predict(model_input, (params or {}).get("task"))


mlflow.models.set_model(PointerModel())
