"""Tasks, one in each file."""

from fedq.learning.task import Classification
from fedq.learning.tasks.multilabel import Multilabel
from fedq.learning.tasks.next_token import NextToken
from fedq.learning.tasks.regression import Regression

__all__ = ["Classification", "Multilabel", "NextToken", "Regression"]
