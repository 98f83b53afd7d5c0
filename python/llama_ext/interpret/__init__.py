"""Why a model says what it says: how much each token counts, and how far such scores can be trusted."""

from llama_ext.interpret.attribution import Attribution, attribute
from llama_ext.interpret.measures import Faithfulness, Measure, faithfulness
from llama_ext.interpret.questions import Target
from llama_ext.interpret.token_texts import Word

__all__ = ["Attribution", "Faithfulness", "Measure", "Target", "Word", "attribute", "faithfulness"]
