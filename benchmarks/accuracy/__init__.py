"""Which accuracy does each optimizer reach as the batch grows?"""
