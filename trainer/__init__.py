"""Training and evaluation. `trainer.type` names a class of this table; a subclass registers itself by being here."""
